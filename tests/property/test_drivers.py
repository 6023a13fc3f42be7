"""Every writable driver against a bytearray: each kind of image, any requests in any order, two readers or more.

The requests are writes, zeros, discards, open reservations, failed flushes, closings in good order and not, repairs;
for qcow2 snapshots and new sizes, too (`tapfs.testing.operations`).
"""

from __future__ import annotations

import pytest

from tapfs.testing import operations
from tests.driver_rows import ALL, ROWS


@pytest.mark.parametrize(("name", "kind"), ALL)
def test_any_requests_in_any_order(name: str, kind: str) -> None:
    row = ROWS[name]
    operations.run(row.subject(kind), len(kind), row.requests)


@pytest.mark.parametrize(("name", "kind", "seed"), [("qcow", "blktap-stale", 1796028042)])
def test_seeds_that_have_failed(name: str, kind: str, seed: int) -> None:
    operations.run(ROWS[name].subject(kind), seed, 10)
