"""Differencing VHDs: the names of the parent in every encoding, its identity, and chains of several images."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

import tapfs as tapfs_package
from tapfs import ImageError
from tapfs.driver import OpenRequest
from tapfs.formats.vhd import FORMAT
from tapfs.formats.vhd.locators import candidates, local_name, new_locators, written_names
from tapfs.testing.model import MemoryFile
from tests.conftest import Ran
from tests.vhd_images import FIXED, PARENTS, Block, Vhd, by_bytes, differencing, write_to

Run = Callable[..., Ran]

CHOICE = random.Random(2)
CHILD = differencing()
BASE = Vhd(
    uuid=PARENTS, blocks={index: Block(CHOICE.randbytes(16384)) for index in (0, 1, 3, 5)}, size=5 * 16384 + 1536
)
BASE_DISK = by_bytes(BASE.content())
DONE = (0, "", "")


def wide(text: str) -> bytes:
    return text.encode("utf-16-le")


def names_of(*locators: tuple[bytes, bytes], name: str = "", **changes: Any) -> list[str]:
    """The names that are tried for the parent, in their order."""
    content = replace(CHILD, locators=locators, parent_name=name, **changes).content()
    reference = FORMAT.open(MemoryFile(content), OpenRequest(lenient=True)).geometry.backing
    return [] if reference is None else [reference.name, *reference.others]


@pytest.mark.parametrize(
    ("code", "text", "expected"),
    [
        (b"W2ru", wide(".\\base.vhd"), ["base.vhd"]),
        (b"W2ru", wide("..\\disks\\base.vhd"), ["../disks/base.vhd", "base.vhd"]),
        (b"W2ru", wide(".\\Größe 1.vhd\0rest"), ["Größe 1.vhd"]),
        (b"W2ku", wide("C:\\disks\\base.vhd"), ["base.vhd", "/disks/base.vhd"]),
        (b"W2ku", wide("\\\\?\\C:\\disks\\base.vhd"), ["base.vhd", "/disks/base.vhd"]),
        (b"W2ku", wide("\\\\server\\share\\base.vhd"), ["base.vhd", "//server/share/base.vhd"]),
        (b"W2ku", wide(".\\base.vhd"), ["base.vhd"]),  # as blktap writes it
        (b"MacX", b"file:///disks/a%20base.vhd", ["a base.vhd", "/disks/a base.vhd"]),
        (b"MacX", b"file://localhost/disks/base.vhd", ["base.vhd", "/disks/base.vhd"]),
        (b"MacX", b"./base.vhd", ["base.vhd"]),
        (b"Wi2r", b"base.vhd", ["base.vhd"]),
        (b"Wi2k", b"D:\\base.vhd", ["base.vhd", "/base.vhd"]),
        (b"Mac ", b"an alias", []),
        (b"W2ru", wide(".."), []),
        (b"W2ru", wide("\0base.vhd"), []),
        (b"W2ru", b"x", []),
    ],
)
def test_the_names_in_locators(code: bytes, text: bytes, expected: list[str]) -> None:
    assert names_of((code, text)) == expected


def test_names_beside_the_image_come_before_others() -> None:
    found = names_of(
        (b"W2ku", wide("C:\\far\\away.vhd")),
        (b"MacX", b"file:///far/mac.vhd"),
        (b"W2ru", wide(".\\near.vhd")),
        name="n",
    )
    assert found == ["near.vhd", "n", "mac.vhd", "away.vhd", "/far/mac.vhd", "/far/away.vhd"]


def test_the_space_of_a_locator_in_sectors_or_bytes() -> None:
    for in_sectors in (False, True):
        assert names_of((b"W2ru", wide(".\\base.vhd")), space_in_sectors=in_sectors) == ["base.vhd"]


def test_hostile_locators() -> None:
    content = bytearray(CHILD.content())
    at = 512 + 576
    for length, offset in ((0xFFFFFFFF, 2048), (512, 1 << 63), (512, len(content) - 100), (0, 0)):
        content[at + 8 : at + 12] = length.to_bytes(4, "big")
        content[at + 16 : at + 24] = offset.to_bytes(8, "big")
        driver: Any = FORMAT.open(MemoryFile(bytes(content)), OpenRequest(lenient=True))
        assert [name.code for name in driver.names] == ["W2ku", "name"]
        assert driver.check().corruptions >= 1  # the checksum of the header at least


def test_a_differencing_image_that_names_nothing_is_refused() -> None:
    content = replace(CHILD, locators=(), parent_name="").content()
    with pytest.raises(ImageError, match="give no name"):
        FORMAT.open(MemoryFile(content), OpenRequest())


def test_what_is_written_is_read() -> None:
    for name in ("base.vhd", "../x/base.vhd", "/images/base 1.vhd", "./a:b", "Größe.vhd"):
        made = new_locators(name, 0)
        header: Any = type("Header", (), {"locators": made.locators, "parent_name": bytes(512)})
        found = candidates(written_names(MemoryFile(made.data), header))
        assert local_name(name) in found
        assert len(made.locators) == 8


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with base.vhd and child.vhd over it; it is the working directory."""
    monkeypatch.chdir(tmp_path)
    write_to(tmp_path / "base.vhd", BASE)
    write_to(tmp_path / "child.vhd", CHILD)
    return tmp_path


def read(path: str, **options: Any) -> bytes:
    with tapfs_package.open(path, **options) as disk:
        return disk.read(0, disk.size)


@pytest.mark.usefixtures("folder")
def test_a_chain_of_files() -> None:
    assert read("child.vhd") == by_bytes(CHILD.content(), BASE_DISK)


def test_a_missing_parent_is_an_error_and_never_zeros(tapfs: Run, folder: Path) -> None:
    (folder / "base.vhd").unlink()
    commands = (
        ["convert", "-O", "raw", "child.vhd", "out"],
        ["map", "child.vhd"],
        ["compare", "child.vhd", "child.vhd"],
    )
    for words in commands:
        code, _, err = tapfs(*words)
        assert code == 17, words
        assert "its backing file base.vhd is missing" in err
    assert not (folder / "out").exists()


def test_another_image_under_the_parents_name(tapfs: Run, folder: Path) -> None:
    write_to(folder / "base.vhd", replace(BASE, uuid=bytes(16)))
    code, _, err = tapfs("convert", "-O", "raw", "child.vhd", "out")
    assert code == 2
    assert f"names uuid:{UUID(bytes=PARENTS)}" in err
    assert tapfs("convert", "--any-parent", "-O", "raw", "child.vhd", "out") == DONE
    assert (folder / "out").read_bytes() == by_bytes(CHILD.content(), BASE_DISK)


def test_a_parent_that_was_moved_into_the_folder_is_found(folder: Path) -> None:
    child = replace(CHILD, locators=((b"W2ku", wide("C:\\VMs\\Old\\base.vhd")),), parent_name="")
    write_to(folder / "child.vhd", child)
    assert read("child.vhd") == by_bytes(child.content(), BASE_DISK)


def test_differencing_over_differencing_over_fixed(folder: Path) -> None:
    fixed = Vhd(type=FIXED, size=BASE.size, body=BASE_DISK, uuid=bytes([1] * 16))
    middle = differencing(
        uuid=PARENTS, parent_uuid=fixed.uuid, locators=((b"W2ru", wide(".\\fixed.vhd")),), parent_name="fixed.vhd"
    )
    write_to(folder / "fixed.vhd", fixed)
    write_to(folder / "base.vhd", middle)
    assert read("child.vhd") == by_bytes(CHILD.content(), by_bytes(middle.content(), BASE_DISK))


def test_tapdisk_over_a_raw_disk(folder: Path) -> None:
    """The null UUID says that the parent is raw, whatever its bytes look like."""
    (folder / "base.vhd").write_bytes(BASE.content())
    child = replace(CHILD, creator=b"tap\0", creator_version=0x10003, parent_uuid=bytes(16))
    write_to(folder / "child.vhd", child)
    assert read("child.vhd") == by_bytes(child.content(), BASE.content())


def test_a_null_uuid_of_others_is_no_identity(folder: Path) -> None:
    write_to(folder / "base.vhd", replace(BASE, uuid=bytes(16)))
    write_to(folder / "child.vhd", replace(CHILD, parent_uuid=bytes(16)))
    assert read("child.vhd") == by_bytes(CHILD.content(), BASE_DISK)


@pytest.mark.usefixtures("folder")
def test_zeros_in_a_child_hide_the_parent(tapfs: Run) -> None:
    assert tapfs("create", "-f", "vhd", "-b", "base.vhd", "-F", "vhd", "new.vhd") == DONE
    expected = bytearray(BASE_DISK)
    with tapfs_package.open("new.vhd", writable=True) as disk:
        assert disk.read(0, disk.size) == BASE_DISK
        disk.write_zeroes(1000, 20_000)
        disk.write(50_000, b"x" * 700)
        disk.discard(60_000, 5000)
    expected[1000:21_000] = bytes(20_000)
    expected[50_000:50_700] = b"x" * 700
    assert read("new.vhd") == expected
    assert by_bytes(Path("new.vhd").read_bytes(), BASE_DISK) == expected


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("parent", ["base.vhd", "child.vhd", "fixed.vhd", "raw.raw"])
def test_an_overlay_over_each(tapfs: Run, parent: str) -> None:
    assert tapfs("convert", "-O", "vhd", "-o", "subformat=fixed", "child.vhd", "fixed.vhd") == DONE
    assert tapfs("convert", "-O", "raw", "child.vhd", "raw.raw") == DONE
    assert tapfs("create", "-f", "vhd", "-b", parent, "-F", "raw" if parent == "raw.raw" else "vhd", "new.vhd") == DONE
    below = read(parent, format="raw" if parent == "raw.raw" else "vhd")
    assert read("new.vhd") == below
    with tapfs_package.open("new.vhd", writable=True) as disk:
        disk.write(1234, b"mine")
    assert read("new.vhd") == below[:1234] + b"mine" + below[1238:]
    assert tapfs("check", "-q", "new.vhd").code == 0


@pytest.mark.usefixtures("folder")
def test_a_parent_of_another_format_is_refused(tapfs: Run) -> None:
    assert tapfs("create", "-f", "qcow", "base.qcow", "1M") == DONE
    code, _, err = tapfs("create", "-f", "vhd", "-b", "base.qcow", "-F", "qcow", "new.vhd")
    assert code == 12
    assert "the parent of a VHD is a VHD with a UUID or a raw disk, not a qcow image" in err
    assert not Path("new.vhd").exists()


@pytest.mark.usefixtures("folder")
def test_a_child_may_be_larger_than_its_parent(tapfs: Run) -> None:
    assert tapfs("create", "-f", "vhd", "-b", "base.vhd", "-F", "vhd", "new.vhd", "200K") == DONE
    assert read("new.vhd") == BASE_DISK.ljust(200 << 10, b"\0")


@pytest.mark.usefixtures("folder")
def test_info_says_what_the_image_says_of_its_parent(tapfs: Run) -> None:
    code, out, _ = tapfs("info", "-v", "child.vhd")
    assert code == 0
    for said in ("differencing", str(UUID(bytes=PARENTS)), "C:\\disks\\base.vhd", "W2ru"):
        assert said in out.replace("\\\\", "\\")


@pytest.mark.usefixtures("folder")
def test_info_is_as_described(tapfs: Run) -> None:
    """The fixture compares what is printed with the schema."""
    assert tapfs("create", "-f", "vhd", "-o", "subformat=fixed", "fixed.vhd", "1M") == DONE
    for path in ("base.vhd", "child.vhd", "fixed.vhd"):
        assert tapfs("info", "--json", path).code == 0
