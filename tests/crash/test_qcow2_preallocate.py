"""Places for what was added to a qcow2 disk: after a crash at any moment all of it reads as zeros."""

from __future__ import annotations

import random

import pytest

from tapfs.disk.probe import format_named
from tapfs.driver import CreatableFormat, CreateRequest, Driver, OpenRequest
from tapfs.formats.qcow2 import preallocate
from tapfs.formats.qcow2.editable import EditableQcow2Driver
from tapfs.plan import Plan, Step
from tapfs.testing.model import MemoryFile, ModelDisk

OLD, NEW = 70 << 10, 200 << 10
KINDS = {
    "small clusters": {"cluster_size": "4096"},
    "refcounts of 1 bit": {"cluster_size": "512", "refcount_bits": "1"},
    "subclusters": {"cluster_size": "16384", "extended_l2": "on"},
}


def opened(file: MemoryFile) -> EditableQcow2Driver:
    driver: Driver = format_named("qcow2").open(file, OpenRequest(writable=True, further=file))
    assert isinstance(driver, EditableQcow2Driver)
    return driver


def grown(kind: str, choice: random.Random) -> tuple[MemoryFile, bytes]:
    """An image that got its new size, with stale bytes behind all that is in use, and its disk."""
    found = format_named("qcow2")
    assert isinstance(found, CreatableFormat)
    file = MemoryFile()
    file.apply(found.create(CreateRequest(OLD, options=KINDS[kind], name="image")))
    disk = ModelDisk(opened(file), file)
    disk.write(0, choice.randbytes(OLD))
    disk.end()
    for plan in opened(file).make_room(NEW):
        file.apply(plan)
    for plan in opened(file).resize(NEW):
        file.apply(plan)
    file.data.extend(b"stale" * 8000)
    file = file.copy()
    return file, ModelDisk(opened(file), file).whole()


@pytest.mark.parametrize(
    ("kind", "mode"), [("small clusters", "metadata"), ("refcounts of 1 bit", "full"), ("subclusters", "falloc")]
)
def test_a_crash_leaves_zeros(kind: str, mode: str) -> None:
    choice = random.Random(f"{kind} {mode}")
    file, expected = grown(kind, choice)
    assert expected[OLD:] == bytes(NEW - OLD)
    for plan in opened(file).preallocate(mode, OLD, NEW):
        file.apply(plan)
    for epoch in range(len(file.epochs)):
        for _ in range(4):
            left = file.crashed_files(epoch, choice)
            assert opened(left).check().corruptions == 0
            assert ModelDisk(opened(left), left).whole() == expected, epoch
    assert opened(file.copy()).check().leaks == 0


def test_the_test_notices_a_wrong_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the zeros that come first the bytes that lay behind all that was in use would show."""

    def without_zeros(*stages: list[Step]) -> Plan:
        return Plan((tuple(stages[0]),))

    monkeypatch.setattr(preallocate, "plan", without_zeros)
    with pytest.raises(AssertionError):
        test_a_crash_leaves_zeros("small clusters", "metadata")
