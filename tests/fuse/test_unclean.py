"""`tapfs mount --files` of file systems that were in use when their disk was copied: what the journal has is missed."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import Ran
from tests.fuse.conftest import Mounts, make_file_system

pytestmark = pytest.mark.usefixtures("root", "no_new_loop_device")


@contextmanager
def in_use(image: Path) -> Iterator[Path]:
    """The image's file system, mounted writable by the kernel."""
    inside = image.with_suffix(".inside")
    inside.mkdir()
    subprocess.run(["mount", "-o", "loop", image, inside], check=True)
    try:
        yield inside
    finally:
        subprocess.run(["umount", inside], check=True)
        inside.rmdir()


def synced(path: Path) -> None:
    """Make a file that survives a crash from now on."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w") as file:
        file.write("synced\n")
        file.flush()
        os.fsync(file.fileno())


def copied(image: Path, name: str) -> Path:
    copy = image.with_name(name)
    subprocess.run(["cp", "--sparse=always", image, copy], check=True)
    return copy


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_a_disk_copied_in_use(mounts: Mounts, tmp_path: Path, content: Path, kind: str) -> None:
    """What was synced last is in the journal alone: a read-only mount says so, --temp shows it."""
    image = tmp_path / "image.raw"
    make_file_system(image, kind, content)
    with in_use(image) as inside:
        synced(inside / "early")
        subprocess.run(["sync", "-f", inside], check=True)
        synced(inside / "etc" / "late")
        live = copied(image, "live.raw")
    directory = mounts.directory()
    said = mounts.run("mount", "--files", live, directory)
    assert (said.code, said.out) == (0, "")
    assert said.err.count("\n") == 1
    assert f"{live}: the {kind} file system was not unmounted cleanly" in said.err
    assert "--temp" in said.err
    assert not (directory / "etc" / "late").exists()
    mounts.umount(directory)
    directory = mounts.mount(live, "--files", "--temp")
    assert (directory / "etc" / "late").read_text() == "synced\n"
    mounts.umount(directory)
    directory = mounts.mount(image, "--files")  # it was unmounted meanwhile: nothing is said
    assert (directory / "etc" / "late").read_text() == "synced\n"
    mounts.umount(directory)


def test_a_disk_copied_while_it_was_frozen(mounts: Mounts, tmp_path: Path, content: Path) -> None:
    """A snapshot of a frozen XFS lacks nothing, although the kernel calls its log dirty."""
    image = tmp_path / "image.raw"
    make_file_system(image, "xfs", content)
    with in_use(image) as inside:
        synced(inside / "file")
        subprocess.run(["fsfreeze", "--freeze", inside], check=True)
        frozen = copied(image, "frozen.raw")
        subprocess.run(["fsfreeze", "--unfreeze", inside], check=True)
    assert "DIRTY" in subprocess.run(["xfs_logprint", "-t", frozen], check=False, capture_output=True, text=True).stdout
    directory = mounts.mount(frozen, "--files")
    assert (directory / "file").read_text() == "synced\n"
    mounts.umount(directory)


def test_a_fat_that_was_in_use(mounts: Mounts, tmp_path: Path, content: Path) -> None:
    """It has no journal, so no mount mends it."""
    image = tmp_path / "image.raw"
    make_file_system(image, "vfat", content)
    with image.open("r+b") as file:
        file.seek(37)
        file.write(b"\1")
    for options in ([], ["--temp"]):
        directory = mounts.directory()
        said = mounts.run("mount", "--files", *options, image, directory)
        assert said == Ran(
            0,
            "",
            f"tapfs: {image}: the vfat file system was not unmounted cleanly: what was being written then may be"
            " damaged; check it (fsck, chkdsk)\n",
        )
        mounts.umount(directory)
