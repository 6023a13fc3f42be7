"""An amendment of a qcow2 image after a crash at any moment: the image is as before or as wanted, its disk the same."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest

from tapfs.disk.probe import format_named
from tapfs.driver import Amendable, BackingReference, CreatableFormat, CreateRequest, Driver, OpenRequest
from tapfs.errors import ImageError
from tapfs.extent import Extent
from tapfs.formats.qcow2 import head_change, refcount_width
from tapfs.formats.qcow2.editable import EditableQcow2Driver
from tapfs.plan import Plan, Step
from tapfs.testing.crash import in_wrong_order
from tapfs.testing.model import MemoryFile, ModelDisk
from tests import qcow2_images

SIZE = 3 << 20
#: Kind: the options of create, then the options of each amendment.
KINDS: dict[str, tuple[dict[str, str], list[dict[str, str]]]] = {
    "version 3": ({}, [{"compat": "0.10"}, {"compat": "1.1", "lazy_refcounts": "on"}, {"compression_type": "zstd"}]),
    "version 2": ({"compat": "0.10"}, [{"compat": "v3", "compression_type": "zstd"}, {"compression_type": "zlib"}]),
    "512": ({"cluster_size": "512"}, [{"compat": "0.10"}, {"compat": "1.1"}, {"lazy_refcounts": "on"}]),
    "4096": ({"cluster_size": "4096", "lazy_refcounts": "on"}, [{"compat": "v2"}, {"compat": "v3"}]),
    "refcounts": (
        {"cluster_size": "512", "refcount_bits": "1"},
        [{"refcount_bits": "64"}, {"refcount_bits": "2"}, {"refcount_bits": "16", "compat": "0.10"}],
    ),
    "subclusters": ({"extended_l2": "on"}, [{"compression_type": "zstd"}, {"lazy_refcounts": "on"}]),
}
PARENT = BackingReference("/a/parent.raw", "raw")


class Seen(NamedTuple):
    """The header without its places, the parent's name, and the map."""

    choices: tuple[int, ...]
    backing: BackingReference | None
    extents: list[Extent]


def opened(file: MemoryFile, *, writable: bool = False) -> Driver:
    return format_named("qcow2").open(file, OpenRequest(writable=writable, further=file))


def seen(file: MemoryFile) -> Seen:
    driver = opened(file, writable=True)
    assert isinstance(driver, EditableQcow2Driver)
    header = driver.header
    choices = (header.version, header.compatible, header.incompatible, header.compression_type, header.refcount_order)
    assert driver.check().corruptions == 0
    extents = [extent._replace(in_place=False) for extent in driver.map(0, SIZE)]
    return Seen(choices, driver.geometry.backing, extents)


def new_image(options: dict[str, str], choice: random.Random) -> MemoryFile:
    found = format_named("qcow2")
    assert isinstance(found, CreatableFormat)
    file = MemoryFile()
    file.apply(found.create(CreateRequest(SIZE, backing=PARENT, options=options, name="image")))
    file = file.copy()
    disk = ModelDisk(opened(file, writable=True), file)  # type: ignore[arg-type]
    for at in range(0, SIZE, 1 << 20):
        disk.write(at + choice.randrange(1 << 19), choice.randbytes(5000))
    disk.end()
    return file.copy()


@pytest.mark.parametrize("kind", KINDS)
def test_a_crash_leaves_the_old_choices_or_the_new_ones(kind: str) -> None:
    options, amendments = KINDS[kind]
    choice = random.Random(kind)
    file = new_image(options, choice)
    for amendment in amendments:
        before = seen(file)
        driver = opened(file, writable=True)
        assert isinstance(driver, Amendable)
        for plan in driver.amend(amendment):
            file.apply(plan)
        after = seen(file)
        assert after.choices != before.choices
        assert (after.backing, after.extents) == (before.backing, before.extents)
        for epoch in range(len(file.epochs)):
            for _ in range(6):
                assert seen(file.crashed_files(epoch, choice)) in (before, after), (epoch, amendment)
        file = file.copy()


def old_snapshot_and_full_refcounts() -> MemoryFile:
    """An image of version 2 whose snapshot does not say its sizes, without a free cluster or refcount table entry."""
    file = qcow2_images.created(64 << 10, {"cluster_size": "512", "compat": "0.10"}, None)
    disk = qcow2_images.opened(file, b"")
    disk.write(5000, b"data" * 2000)
    disk.flush()
    qcow2_images.take_snapshot(file, "before")
    fields, data = qcow2_images.Fields(bytes(file.data)), file.data
    entry = data[fields.snapshots_at : fields.snapshots_at + 56 + len("1before")]
    shorter = entry[:36] + bytes(4) + entry[56:]
    data[fields.snapshots_at : fields.snapshots_at + len(entry)] = shorter.ljust(len(entry), b"\0")
    block = int.from_bytes(data[fields.reftable_at : fields.reftable_at + 8], "big")
    for at in range(block, block + 512, 2):
        data[at : at + 2] = data[at : at + 2] if any(data[at : at + 2]) else b"\0\1"
    for at in range(fields.reftable_at + 8, fields.reftable_at + 512, 8):
        data[at : at + 8] = len(data).to_bytes(8, "big")
        data.extend(b"\0\1" * 256)
    return file.copy()


def test_a_refcount_table_that_moves_for_the_sizes_of_snapshots_stays_where_it_went() -> None:
    choice = random.Random(5)
    file = old_snapshot_and_full_refcounts()
    before = int.from_bytes(file.data[48:56], "big")
    driver = opened(file, writable=True)
    assert isinstance(driver, Amendable)
    for plan in driver.amend({"compat": "1.1"}):
        file.apply(plan)
    assert int.from_bytes(file.data[48:56], "big") != before
    versions = set[int]()
    for epoch in range(len(file.epochs)):
        for _ in range(2):
            left = opened(file.crashed_files(epoch, choice), writable=True)
            assert isinstance(left, EditableQcow2Driver)
            assert left.check().corruptions == 0
            versions.add(left.header.version)
    assert versions == {2, 3}


def test_the_test_notices_a_head_that_comes_before_the_refcounts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refcount_width, "in_plans", lambda *_: [Plan()])
    with pytest.raises((AssertionError, ImageError)):
        test_a_crash_leaves_the_old_choices_or_the_new_ones("refcounts")


def test_the_test_notices_a_wrong_order(monkeypatch: pytest.MonkeyPatch) -> None:
    right = head_change.plan

    def one_stage(*stages: list[Step]) -> Plan:
        return in_wrong_order(right(*stages), "one stage")

    monkeypatch.setattr(head_change, "plan", one_stage)
    with pytest.raises((AssertionError, ImageError)):
        test_a_crash_leaves_the_old_choices_or_the_new_ones("version 2")
