"""The rings that a process with little memory offers."""

from __future__ import annotations

import pytest

from tapfs.xen.supervisor.claim import rings_to_offer


@pytest.mark.parametrize(
    ("mebibytes", "processors", "offered"),
    [(1024, 8, (4, 4)), (1024, 1, (1, 4)), (256, 4, (4, 4)), (224, 4, (4, 3)), (160, 4, (2, 3)), (113, 4, (1, 0))],
)
def test_what_memory_can_pay_is_offered(mebibytes: int, processors: int, offered: tuple[int, int]) -> None:
    assert rings_to_offer(mebibytes << 20, processors) == offered
