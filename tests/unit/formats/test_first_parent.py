"""Images of every kind get a first parent and lose it again: what they hold themselves stays, for others as well."""

from __future__ import annotations

import random

import pytest

from tapfs.disk.probe import format_named
from tapfs.driver import BackingReference, Checkable, CreatableFormat, CreateRequest, Driver, OpenRequest, Rebasable
from tapfs.errors import ErrorKind, ImageError
from tapfs.testing.model import MemoryFile, read_extents
from tests import vhd_images
from tests.driver_rows import ROWS

#: Kinds that cannot have a parent, or not the one that the test has.
ALONE = {("vhd", "dynamic-tail"), ("vhdx", "fixed"), ("vdi", "fixed"), ("vmdk", "flat"), ("vmdk", "flat-parts")}
ALONE |= {("vhdx", kind) for kind in ROWS["vhdx"].kinds if "large sectors" in kind}


def opened(name: str, file: MemoryFile, *, writable: bool = False) -> Driver:
    return format_named(name).open(file, OpenRequest(writable=writable, further=file))


def rebase(name: str, file: MemoryFile, backing: BackingReference | None, parent: Driver | None) -> Driver:
    driver = opened(name, file, writable=True)
    assert isinstance(driver, Rebasable)
    for plan in driver.rebase(backing, parent):
        file.apply(plan)
    return opened(name, file)


def new_parent(name: str) -> Driver:
    made = format_named(name)
    assert isinstance(made, CreatableFormat)
    file = MemoryFile()
    file.apply(made.create(CreateRequest(1 << 20, name="p.img")))
    return opened(name, file)


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in ("vhd", "vhdx", "vdi", "vmdk") for kind in ROWS[name].kinds]
)
def test_what_an_image_holds_stays(name: str, kind: str) -> None:
    file, _ = ROWS[name].subject(kind).begin(random.Random(3))
    driver = opened(name, file, writable=True)
    size = driver.geometry.virtual_size
    held = read_extents(driver, file, 0, size)
    file, backing, parent = file.copy(), BackingReference("p.img", name), new_parent(name)
    if (name, kind) in ALONE:
        before = bytes(file.data)
        with pytest.raises(ImageError) as caught:
            rebase(name, file, backing, parent)
        assert caught.value.kind in {ErrorKind.UNSUPPORTED, ErrorKind.READ_ONLY}
        assert bytes(file.data) == before
        return
    for wanted in (None, backing, None, backing, None):
        now = rebase(name, file, wanted, None if wanted is None else parent)
        assert (now.geometry.backing is None) == (wanted is None)
        assert read_extents(now, file, 0, size) == held
        assert isinstance(now, Checkable)
        report = now.check()
        assert (report.corruptions, report.leaks) == (0, 0)
    if name == "vhd":
        assert vhd_images.ignoring_bitmaps(bytes(file.data))[:size] == held
