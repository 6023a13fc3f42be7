"""Images of every writable format after a crash at any moment: good or leaking, with all that a flush acknowledged.

The crash model: everything before the last barrier is durable, of everything since any part may be, in any order, torn
at sectors of 512 bytes (`tapfs.testing.crash`).
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from tapfs.driver import OpenRequest
from tapfs.errors import ImageError
from tapfs.plan import Plan
from tapfs.testing import crash
from tapfs.testing.crash import in_wrong_order
from tests.driver_rows import ALL, ROWS


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kind in ALL if kind not in ROWS[name].torn])
def test_every_crash_leaves_what_was_acknowledged(name: str, kind: str) -> None:
    row = ROWS[name]
    crash.run(row.subject(kind), len(kind), row.crashes)


def crash_many_times(name: str, kind: str, first_seed: int = 0) -> None:
    for seed in range(first_seed, first_seed + 20):
        crash.run(ROWS[name].subject(kind), seed, 60)


def wrong_order(monkeypatch: pytest.MonkeyPatch, name: str, method: str, order: str) -> None:
    """Have a writer's plans be executed in a wrong order."""
    module, _, writer = ROWS[name].writer.rpartition(".")
    driver: Any = getattr(__import__(module, fromlist=[writer]), writer)
    right = getattr(driver, method)

    def wrong(self: object) -> Plan:
        return in_wrong_order(right(self), order)

    monkeypatch.setattr(driver, method, wrong)


@pytest.mark.parametrize(
    ("name", "kind", "order", "seed"), [(name, *each) for name, row in ROWS.items() for each in row.ordered]
)
def test_the_test_notices_a_wrong_order(
    name: str, kind: str, order: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong_order(monkeypatch, name, "flush", order)
    with pytest.raises((AssertionError, ImageError)):
        crash_many_times(name, kind, seed)


def test_the_test_notices_a_wrong_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_order(monkeypatch, "vhdx", "begin", "reversed")
    with pytest.raises((AssertionError, ImageError)):
        crash_many_times("vhdx", "dynamic")


@pytest.mark.parametrize(
    ("name", "kind", "damage"),
    [(name, kind, what) for name, row in ROWS.items() for what, (kinds, _) in row.damages.items() for kind in kinds],
)
def test_a_crash_in_a_repair_loses_nothing(name: str, kind: str, damage: str) -> None:
    row = ROWS[name]
    subject = row.subject(kind)
    file, parent = subject.begin(random.Random(5))
    right = subject.whole(file, parent)
    row.damages[damage][1](file)
    lenient = row.format.open(file, OpenRequest(lenient=True, further=file))
    assert lenient.geometry.virtual_size == len(right)
    crash.run_repair(subject, file, parent, 5)
    assert subject.whole(file, parent) == right
