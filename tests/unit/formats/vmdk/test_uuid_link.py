"""The parent of a VirtualBox snapshot is named by UUIDs in the disk database, and by no name and no content ID."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import tapfs
from tapfs import ErrorKind, ImageError
from tapfs.driver import Expecting, OpenRequest
from tapfs.formats.vmdk import FORMAT
from tapfs.plan import Write
from tapfs.testing.model import MemoryFile
from tests.vmdk_images import descriptor, hosted, monolithic, sectors

SIZE = 64 << 10
GRAIN = 16 * 512
BASE_UUID, OVER_UUID = "5b8f0a5c-0c1f-4e0c-9a53-5c0c2f9d6a01", "7d0f3e2a-91b4-4d0e-8f1c-3b1f0a9c4e02"
FIRST_CHANGE, NULL = "c2b1a0f9-8e7d-4c6b-a5f4-e3d2c1b0a903", "00000000-0000-0000-0000-000000000000"
BASE_DATA, OVER_DATA = b"b" * SIZE, b"o" * GRAIN


def database(image: str, change: str, parent: str = NULL, parent_change: str = NULL) -> str:
    """The lines of VirtualBox. In an embedded descriptor behind them a UUID lies across two sectors."""
    return (
        f'ddb.uuid.image="{image}"\nddb.uuid.modification="{change}"\n'
        f'ddb.uuid.parent="{parent}"\nddb.uuid.parentmodification="{parent_change}"\n'
    )


def over(parent: str = BASE_UUID, change: str = FIRST_CHANGE, before: str = "") -> bytes:
    return monolithic({1: OVER_DATA}, SIZE, more=before + database(OVER_UUID, NULL, parent, change))


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """A snapshot as VirtualBox has it: the image of the machine beside a folder that has the differences."""
    base = monolithic(dict.fromkeys(range(SIZE // GRAIN), b"b" * GRAIN), SIZE, more=database(BASE_UUID, FIRST_CHANGE))
    (tmp_path / "machine.vmdk").write_bytes(base)
    (tmp_path / "Snapshots").mkdir()
    path = tmp_path / "Snapshots" / f"{{{OVER_UUID}}}.vmdk"
    path.write_bytes(over())
    return path


def disk_of(path: Path, **options: object) -> bytes:
    with tapfs.open(path, **options) as disk:  # type: ignore[arg-type]
        return disk.read(0, disk.size)


WANTED = BASE_DATA[:GRAIN] + OVER_DATA + BASE_DATA[2 * GRAIN :]


def test_the_parent_is_found_by_its_uuid(snapshot: Path) -> None:
    assert disk_of(snapshot) == WANTED


def test_qemu_shows_zeros_for_the_parent(snapshot: Path, tmp_path: Path) -> None:
    words = ["qemu-img", "convert", "-f", "vmdk", "-O", "raw", snapshot, tmp_path / "raw"]
    subprocess.run(words, check=True)
    assert (tmp_path / "raw").read_bytes() == bytes(GRAIN) + OVER_DATA + bytes(SIZE - 2 * GRAIN)


def test_a_missing_parent_is_named(snapshot: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "machine.vmdk").rename(tmp_path / "elsewhere" / "renamed")
    with pytest.raises(ImageError, match=BASE_UUID) as error:
        disk_of(snapshot)
    assert error.value.kind is ErrorKind.NOT_FOUND
    assert disk_of(snapshot, parent_folders=[str(tmp_path / "elsewhere")]) == WANTED


def test_a_parent_that_was_written_since_is_refused(snapshot: Path, tmp_path: Path) -> None:
    with tapfs.open(tmp_path / "machine.vmdk", writable=True, write_base=True) as disk:
        disk.write(0, b"later")
    with pytest.raises(ImageError, match="not the one that it was made over"):
        disk_of(snapshot)
    assert disk_of(snapshot, any_parent=True) == b"later" + WANTED[5:]


def test_a_commit_keeps_the_link(snapshot: Path, tmp_path: Path) -> None:
    tapfs.commit(snapshot)
    assert disk_of(tmp_path / "machine.vmdk") == WANTED
    assert disk_of(snapshot) == WANTED
    assert b"\nddb.uuid.parentmodification" in snapshot.read_bytes()
    with tapfs.open(tmp_path / "machine.vmdk", writable=True, write_base=True) as disk:
        disk.write(0, b"later")
    with pytest.raises(ImageError, match="not the one that it was made over"):
        disk_of(snapshot)


def test_a_rebase_ends_the_link(snapshot: Path, tmp_path: Path) -> None:
    tapfs.rebase(snapshot, "../machine.vmdk")
    (tmp_path / "machine.vmdk").rename(tmp_path / "other")
    with pytest.raises(ImageError, match=r"machine\.vmdk"):
        disk_of(snapshot)
    (tmp_path / "other").rename(tmp_path / "machine.vmdk")
    assert disk_of(snapshot) == WANTED
    tapfs.rebase(snapshot, None)
    (tmp_path / "machine.vmdk").unlink()
    assert disk_of(snapshot) == WANTED


def test_a_rebase_to_no_parent(snapshot: Path, tmp_path: Path) -> None:
    tapfs.rebase(snapshot, None)
    (tmp_path / "machine.vmdk").unlink()
    assert disk_of(snapshot) == WANTED


def test_a_vdi_over_it_is_committed(snapshot: Path, tmp_path: Path) -> None:
    snapshot.unlink()
    child = tmp_path / "child.vdi"
    tapfs.create(child, "vdi", SIZE)
    with tapfs.open(child, writable=True) as disk:
        disk.write(0, b"child")
    tapfs.rebase(child, "machine.vmdk", unsafe=True)
    wanted = b"child" + bytes(SIZE - 5)  # a block of a VDI is larger than this disk
    assert disk_of(child) == wanted
    tapfs.commit(child)
    assert disk_of(tmp_path / "machine.vmdk") == wanted
    assert disk_of(child) == wanted
    with tapfs.open(child) as disk:
        assert not any(extent.depth == 0 and extent.present for extent in disk.extents())


@pytest.mark.parametrize("before", ["", *("#" * count + "\n" for count in range(60, 120, 7))])
def test_no_moment_of_a_commit_has_another_link(before: str) -> None:
    parent = FORMAT.open(MemoryFile(monolithic({}, SIZE, more=database(BASE_UUID, OVER_UUID)), "p"), OpenRequest())
    file = MemoryFile(over(before=before), "disk.vmdk")
    child = FORMAT.open(file, OpenRequest(writable=True))
    assert isinstance(child, Expecting)
    both = f"uuid:{BASE_UUID} modification:{FIRST_CHANGE}", f"uuid:{BASE_UUID}"
    last = f"uuid:{BASE_UUID} modification:{OVER_UUID}"
    edits = [*child.expect(None), *child.rebase(child.geometry.backing, parent)]
    steps = [step for edit in edits for stage in edit.stages for step in stage]
    for step in steps:
        assert isinstance(step, Write)
        for done in range(len(step.data) + 1):  # torn anywhere
            file.data[step.host_offset : step.host_offset + done] = step.data[:done]
            assert identity_in(file) in (both if step is not steps[-1] or not done else (last,))
    assert identity_in(file) == last


def identity_in(file: MemoryFile) -> str | None:
    """What the image says that its parent is."""
    backing = FORMAT.open(MemoryFile(file.data, "disk.vmdk"), OpenRequest()).geometry.backing
    assert backing is not None
    return backing.identity


def test_what_is_no_uuid_is_an_error() -> None:
    with pytest.raises(ImageError, match=r"ddb\.uuid\.parent of the descriptor is no UUID") as error:
        FORMAT.open(MemoryFile(over("who knows"), "disk.vmdk"), OpenRequest())
    assert error.value.kind is ErrorKind.CORRUPT
    assert error.value.offset is not None


def test_a_null_uuid_names_no_parent() -> None:
    driver = FORMAT.open(MemoryFile(over(NULL), "disk.vmdk"), OpenRequest())
    assert driver.geometry.backing is None


def test_a_content_id_counts_before_the_uuid() -> None:
    line = f'RW {sectors(SIZE)} SPARSE "disk.vmdk"'
    text = descriptor([line], parent_cid=0xABCD, hint="other.vmdk", more=database(OVER_UUID, NULL, BASE_UUID))
    reference = FORMAT.open(MemoryFile(hosted({}, SIZE, text), "disk.vmdk"), OpenRequest()).geometry.backing
    assert reference is not None
    assert reference.name == "other.vmdk"
