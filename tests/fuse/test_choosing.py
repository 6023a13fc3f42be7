"""`tapfs mount --files` chooses a file system, and refuses in words a disk with several or one that is cut short."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.fuse.conftest import MIB, Mounts, ext4
from tests.unit.partitions.test_tables import partitioned

pytestmark = pytest.mark.usefixtures("root", "no_new_loop_device")


def run(*command: object, words: str = "") -> None:
    subprocess.run(list(map(str, command)), input=words, text=True, check=True, capture_output=True)


@pytest.fixture
def twofold(tmp_path: Path, content: Path) -> Path:
    """An ext4 on the whole disk, and a table with one partition that has an ext4, too."""
    path = tmp_path / "twofold.raw"
    path.touch()
    ext4(path, content, 64, label="STALE")
    run("sfdisk", "-q", "--wipe=never", "--wipe-partitions=never", path, words="start=2048\n")
    ext4(path, content, 63, MIB, "REAL")
    return path


def test_a_table_beside_a_whole_file_system_is_a_choice(mounts: Mounts, twofold: Path) -> None:
    refused = mounts.run("mount", "--files", twofold, mounts.directory())
    assert (refused.code, refused.out) == (64, "")
    assert f"{twofold}: has a file system on the whole disk and a partition table" in refused.err
    assert "partition 0 (ext4 'STALE' on the whole disk), partition 1 (ext4 'REAL')" in refused.err
    assert refused.err.endswith("choose one with --partition N\n")
    assert mounts.left_behind() == []
    directory = mounts.mount(twofold, "--files", "--partition", 1)
    assert (directory / "text").read_text() == "hello\n"
    mounts.umount(directory)


def test_partition_0_is_the_whole_disk(mounts: Mounts, flat: Path, tmp_path: Path) -> None:
    directory = mounts.mount(flat, "--files", "--partition", 0)
    assert (directory / "text").read_text() == "hello\n"
    mounts.umount(directory)
    blank = partitioned(tmp_path / "blank.raw", "label: gpt\nsize=4M\n")
    refused = mounts.run("mount", "--files", "--partition", 0, blank, mounts.directory())
    assert (refused.code, "there is no known file system on the disk" in refused.err) == (17, True)


def test_what_the_kernel_does_not_know_is_said_with_the_way_round(mounts: Mounts, tmp_path: Path) -> None:
    volume = tmp_path / "vmfs.raw"
    volume.write_bytes(bytes(0x200000) + (0x2FABF15E).to_bytes(4, "little") + bytes(MIB))
    refused = mounts.run("mount", "--files", volume, mounts.directory())
    assert (refused.code, refused.out) == (12, "")
    assert f"{volume}: the kernel does not know VMFS; mount it without --files" in refused.err
    assert mounts.left_behind() == []


def test_a_table_that_belongs_to_the_file_system_is_no_choice(mounts: Mounts, tmp_path: Path, content: Path) -> None:
    """A disc that also boots from a stick, and a table of one entry that leads to itself."""
    disc = tmp_path / "disc.iso"
    run(
        "xorriso",
        "-as",
        "mkisofs",
        "-quiet",
        "-R",
        "--mbr-force-bootable",
        "-partition_offset",
        "16",
        "-o",
        disc,
        content,
    )
    run("sfdisk", "-q", "--dump", disc)
    directory = mounts.mount(disc, "--files")
    assert (directory / "text").read_text() == "hello\n"
    mounts.umount(directory)
    itself = tmp_path / "itself.raw"
    itself.touch()
    ext4(itself, content, 24)
    with itself.open("r+b") as file:
        file.seek(446)
        file.write(bytes([0, 0, 0, 0, 0x83, 0, 0, 0]) + (0).to_bytes(4, "little") + (24 * 2048).to_bytes(4, "little"))
        file.seek(510)
        file.write(b"\x55\xaa")
    directory = mounts.mount(itself, "--files")
    assert (directory / "text").read_text() == "hello\n"
    mounts.umount(directory)


def test_a_partition_cut_short_is_told(mounts: Mounts, tmp_path: Path, content: Path) -> None:
    """The error names the image, not the mount point, and tells what is wrong with the partition."""
    image = partitioned(tmp_path / "image.raw", "label: dos\nstart=2048\n")
    ext4(image, content, 63, MIB)
    with image.open("r+b") as file:
        file.truncate(40 * MIB)
    refused = mounts.run("mount", "--files", image, mounts.directory())
    assert refused.code == 2
    assert refused.err.startswith(
        f"tapfs: error: {image}: the kernel does not mount the ext4 file system: it seems damaged"
    )
    assert f"partition 1 reaches {24 * MIB} bytes past the end of the disk" in refused.err
    with image.open("r+b") as file:
        file.seek(MIB)
        file.write(bytes(4096))
    refused = mounts.run("mount", "--files", "--partition", 1, image, mounts.directory())
    assert refused.code == 17
    assert refused.err.startswith(
        f"tapfs: error: {image}: there is no known file system on partition 1; partition 1 reaches"
    )


def test_what_has_several_signatures_is_told(mounts: Mounts, flat: Path) -> None:
    with flat.open("r+b") as file:
        file.write(b"hsqs".ljust(28, b"\0") + b"\4\0")
    refused = mounts.run("mount", "--files", flat, mounts.directory())
    assert refused.code == 17
    assert "the disk has the signatures of ext4 and squashfs" in refused.err


def test_large_sectors(mounts: Mounts, tmp_path: Path, content: Path) -> None:
    """An MBR that counts in sectors of 4096 bytes, which nothing on the disk says."""
    image = tmp_path / "image.raw"
    partitioned(image, "label: dos\nstart=256, size=5120\n")
    ext4(image, content, 20, MIB)
    refused = mounts.run("mount", "--files", image, mounts.directory())
    assert refused.code == 17
    assert "say --sector-size 4096" in refused.err
    directory = mounts.mount(image, "--files", "--sector-size", 4096)
    assert (directory / "text").read_text() == "hello\n"
    mounts.umount(directory)
    directory = mounts.mount(image, "--sector-size", 4096)
    assert (directory / "part1").stat().st_size == 20 * MIB
    assert (directory / "info.json").read_text() == mounts.run("info", "--json", "--sector-size", 4096, image).out
    mounts.umount(directory)
