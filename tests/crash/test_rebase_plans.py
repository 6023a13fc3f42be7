"""A new parent's name after a crash at any moment: the image names the old parent or the new one, and maps the same."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest

from tapfs.disk.probe import format_named
from tapfs.driver import (
    BackingReference,
    Checkable,
    CreatableFormat,
    CreateRequest,
    Driver,
    OpenRequest,
    Rebasable,
    Recoverable,
)
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Extent
from tapfs.plan import Plan, Step
from tapfs.testing.crash import in_wrong_order, write_at_random
from tapfs.testing.model import MemoryFile, ModelDisk, read_extents

SIZE = 3 << 20

#: Kind: format, options of create. "no parent" in a kind: the image begins without one.
KINDS: dict[str, tuple[str, dict[str, str]]] = {
    "qcow": ("qcow", {}),
    "qcow, no parent": ("qcow", {}),
    "qcow2": ("qcow2", {}),
    "qcow2, no parent": ("qcow2", {}),
    "qcow2 of version 2": ("qcow2", {"compat": "0.10"}),
    "qcow2, clusters of 512 bytes": ("qcow2", {"cluster_size": "512"}),
    "qcow2, clusters of 4096 bytes": ("qcow2", {"cluster_size": "4096"}),
    "qcow2 with subclusters": ("qcow2", {"extended_l2": "on"}),
    "vmdk": ("vmdk", {}),
    "vmdk, no parent": ("vmdk", {}),
    "vdi": ("vdi", {}),
    "vdi, no parent": ("vdi", {}),
    "vhd": ("vhd", {"block_size": "65536"}),
    "vhd, no parent": ("vhd", {"block_size": "65536"}),
    "vhdx": ("vhdx", {"block_size": "1M"}),
    "vhdx, no parent": ("vhdx", {"block_size": "1M"}),
}
#: Formats whose rebase writes into the blocks of the disk.
TOUCHING = frozenset({"vhd", "vhdx"})
#: Names that take more room than the ones before them, and less.
NAMES = ["b", "/a/rather/long/name" + "/of-a-parent" * 25 + ".img", "short.img"]


class Seen(NamedTuple):
    """What an image says of its parent, its map, and its bytes over zeros if a rebase writes into blocks."""

    backing: BackingReference | None
    extents: list[Extent]
    content: bytes


def new_image(name: str, options: dict[str, str], parent: Driver | None) -> MemoryFile:
    found = format_named(name)
    assert isinstance(found, CreatableFormat)
    backing = None if parent is None else BackingReference("first.img", name)
    file = MemoryFile()
    file.apply(found.create(CreateRequest(SIZE, backing=backing, options=options, parent=parent, name="image")))
    return file.copy()


def opened(name: str, file: MemoryFile, *, writable: bool = False) -> Driver:
    request = OpenRequest(writable=writable, further=file)
    driver = format_named(name).open(file, request)
    plan = driver.recovery() if isinstance(driver, Recoverable) else None
    if plan:
        file.apply(plan)
        driver = format_named(name).open(file, request)
    return driver


def seen(name: str, file: MemoryFile) -> Seen:
    driver = opened(name, file)
    reference = driver.geometry.backing
    extents = [extent._replace(in_place=False) for extent in driver.map(0, SIZE)]
    content = read_extents(driver, file, 0, SIZE) if name in TOUCHING else b""
    return Seen(reference, extents, content)


def execute(file: MemoryFile, driver: Driver, backing: BackingReference | None, parent: Driver | None) -> None:
    assert isinstance(driver, Rebasable)
    for plan in driver.rebase(backing, parent):
        file.apply(plan)


@pytest.mark.parametrize("kind", KINDS)
def test_a_crash_leaves_the_old_parent_or_the_new_one(kind: str) -> None:
    name, options = KINDS[kind]
    choice = random.Random(kind)
    parents = [opened(name, new_image(name, {}, None)) for _ in range(4)]
    start = new_image(name, options, None if "no parent" in kind else parents[0])
    disk = ModelDisk(opened(name, start, writable=True), start)  # type: ignore[arg-type]
    write_at_random(disk, choice, 10)
    disk.end()
    changes: list[tuple[BackingReference | None, Driver | None]] = [
        (BackingReference(text, name), parent) for text, parent in zip(NAMES, parents[1:], strict=True)
    ]
    changes.insert(2, (None, None))
    file = start.copy()
    for backing, parent in changes:
        before = seen(name, file)
        execute(file, opened(name, file, writable=True), backing, parent)
        after = seen(name, file)
        if name == "vdi":  # which names no file
            assert (after.backing is None) == (backing is None)
        elif backing is None:
            assert after.backing is None
        else:
            assert after.backing is not None
            assert backing.name in (after.backing.name, *after.backing.others)
        assert after.content == before.content
        # A block of a VHDX is never partly there without a parent.
        fills = name == "vhdx" and backing is None
        assert fills or after.extents == before.extents
        for epoch in range(len(file.epochs)):
            for number in range(2 if name in TOUCHING else 6):
                left = file.crashed_files(epoch, choice)
                found = seen(name, left)
                assert found.backing in (before.backing, after.backing), (epoch, backing)
                assert found.content == before.content, (epoch, backing)
                assert fills or found in (before, after), (epoch, backing)
                checked = opened(name, left) if name in TOUCHING and number == 0 else None
                assert not isinstance(checked, Checkable) or not checked.check().corruptions, (epoch, backing)
        file = file.copy()


def test_the_test_notices_a_wrong_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan whose stages are one stage leaves heads that are neither old nor new."""
    from tapfs.formats.qcow2 import head_change

    right = head_change.plan

    def one_stage(*stages: list[Step]) -> Plan:
        return in_wrong_order(right(*stages), "one stage")

    monkeypatch.setattr(head_change, "plan", one_stage)
    with pytest.raises((AssertionError, ImageError)):
        test_a_crash_leaves_the_old_parent_or_the_new_one("qcow2")


@pytest.mark.parametrize("kind", ["qcow", "qcow2", "vmdk", "vhd", "vhdx"])
def test_a_name_that_does_not_fit_is_refused_and_changes_nothing(kind: str) -> None:
    name, options = KINDS[kind]
    parent = opened(name, new_image(name, {}, None))
    file = new_image(name, options, parent)
    content = bytes(file.data)
    for text in ("x" * 70000, "nul\0"):
        with pytest.raises(ImageError) as caught:
            execute(file, opened(name, file, writable=True), BackingReference(text, name), parent)
        assert caught.value.kind in {ErrorKind.OUT_OF_BOUNDS, ErrorKind.UNSUPPORTED}
        assert bytes(file.data) == content
