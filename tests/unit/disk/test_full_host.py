"""A host file system that is full: what was written before stays, and a flush finds room for its tables."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from os import statvfs
from pathlib import Path
from random import Random

import pytest

import tapfs
from tapfs import ErrorKind, ImageError

MIB = 1 << 20
SIZE = 64 * MIB


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill_up(disk: tapfs.Image) -> int:
    """Write until the host is full; the bytes that were written before that."""
    for at in range(0, SIZE, MIB):
        try:
            disk.write(at, bytes([at // MIB + 1]) * MIB)
        except ImageError as error:
            if error.kind is not ErrorKind.NO_SPACE:
                raise
            return at
    raise AssertionError("the host has more space than it should")


@pytest.mark.parametrize("format_name", ["qcow", "qcow2", "vmdk", "vdi", "vhd", "vhdx"])
def test_what_was_written_before_the_host_was_full_is_kept(small: Path, format_name: str) -> None:
    path = small / "image"
    tapfs.create(path, format_name, SIZE)
    with tapfs.open(path, format=format_name, writable=True) as disk:
        written = fill_up(disk)
        disk.flush()
    assert written >= 3 * MIB
    with tapfs.open(path, format=format_name) as disk:
        for at in range(0, written, MIB):
            assert disk.read(at, MIB) == bytes([at // MIB + 1]) * MIB
        # The write that failed has written a part or nothing.
        assert set(disk.read(written, MIB)) <= {0, written // MIB + 1}
    assert tapfs.check(path, format=format_name).corruptions == 0


#: Formats with options under which tables and blocks are small, so that a few MiB have many of them.
MANY_TABLES = {
    "qcow": {"cluster_size": "512"},
    "qcow blktap": {"blktap": "on"},
    "qcow2": {"cluster_size": "512", "refcount_bits": "64"},
    "qcow2 subclusters": {"extended_l2": "on", "cluster_size": "16384"},
    "vmdk": {},
    "vmdk vmfsSparse": {"subformat": "vmfsSparse"},
    "vdi": {},
    "vhd": {"block_size": "65536"},
    "vhdx": {"block_size": "1M"},
    "vhdx overlay": {"block_size": "1M"},
}


@pytest.mark.parametrize("kind", MANY_TABLES)
def test_what_a_full_host_has_accepted_can_be_flushed(small: Path, kind: str) -> None:
    """For each number of pages that the host has left: a write is refused at once, or a flush has space for it."""
    format_name = kind.split(maxsplit=1)[0]
    path, parent, filler = small / "image", small / "parent", small / "filler"
    if kind.endswith("overlay"):
        tapfs.create(parent, format_name, SIZE)
    backing = str(parent) if parent.exists() else None
    random = Random(kind)
    for pages in (0, 1, 2, 3, 5, 8, 13, 21):
        tapfs.create(path, format_name, SIZE, backing=backing, options=MANY_TABLES[kind], overwrite=True)
        free = statvfs(small)
        filler.write_bytes(bytes((free.f_bavail - pages) * free.f_bsize))
        accepted: dict[int, int] = {}
        refused = 0
        with tapfs.open(path, format=format_name, writable=True) as disk:
            while refused < 4:
                at, byte = random.randrange(SIZE // 4096) * 4096, random.randrange(1, 256)
                try:
                    disk.write(at, bytes([byte]) * 4096)
                except ImageError as error:
                    if error.kind is not ErrorKind.NO_SPACE:
                        raise
                    refused += 1
                    accepted.pop(at, None)
                else:
                    accepted[at] = byte
                if random.random() < 0.2:
                    disk.flush()
            disk.flush()
            filler.unlink()
        with tapfs.open(path, format=format_name) as disk:
            for at, byte in accepted.items():
                assert disk.read(at, 4096) == bytes([byte]) * 4096
        assert tapfs.check(path, format=format_name).corruptions == 0


@pytest.mark.parametrize("format_name", ["qcow", "qcow2", "vmdk", "vdi", "vhd", "vhdx"])
def test_a_write_that_a_full_host_refuses_leaks_nothing(small: Path, format_name: str) -> None:
    """The host stays full to the end. What a refused write had begun is nowhere in the file, for each number of pages.

    A VHD whose bitmap had found space, and whose footer had not, ended behind its footer, which nobody knew then.
    """
    path, filler = small / "image", small / "filler"
    refused = 0
    for pages in (1, 2, 3, 5):
        tapfs.create(path, format_name, SIZE, overwrite=True)
        free = statvfs(small)
        filler.write_bytes(bytes((free.f_bavail - pages) * free.f_bsize))
        with tapfs.open(path, format=format_name, writable=True) as disk:
            for at in (20 * MIB, 40 * MIB, 60 * MIB, 10 * MIB):
                try:
                    disk.write(at + pages * 4096, b"\7" * 4096)
                except ImageError as error:
                    if error.kind is not ErrorKind.NO_SPACE:
                        raise
                    refused += 1
                else:
                    disk.flush()
        report = tapfs.check(path, format=format_name)
        assert (report.corruptions, report.leaks, report.findings) == (0, 0, []), pages
        filler.unlink()
    assert refused
