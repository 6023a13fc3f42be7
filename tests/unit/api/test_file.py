"""Disks and partitions as file objects: for Python's own readers of files, and for those of others."""

from __future__ import annotations

import errno
import io
import os
import random
import subprocess
import tarfile
import warnings
import zipfile
from pathlib import Path

import pytest

import tapfs
from tapfs import ErrorKind, ImageError

SIZE = 4 << 20
START, LENGTH = 1 << 20, 2 << 20


@pytest.fixture
def qcow(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow"
    tapfs.create(path, "qcow", SIZE)
    return path


@pytest.fixture
def partitioned(qcow: Path, tmp_path: Path) -> Path:
    """A qcow image with one partition, and an extended one that holds another."""
    raw = tmp_path / "disk.raw"
    with raw.open("wb") as file:
        file.truncate(SIZE)
    table = "label: dos\nstart=2048, size=4096\nstart=6144, size=2048, type=5\nstart=6272, size=512\n"
    subprocess.run(["sfdisk", "-q", "--no-reread", raw], input=table.encode(), check=True)
    tapfs.convert(raw, qcow, format="raw", target_format="qcow")
    return qcow


def test_it_reads_and_writes_as_a_file_does(qcow: Path) -> None:
    """The same random calls on a disk and on a file of its size."""
    choice = random.Random(1)
    with tapfs.open_file(qcow, writable=True) as disk, io.BytesIO(bytes(SIZE)) as model:
        for _ in range(300):
            place = choice.choice([(choice.randrange(SIZE), os.SEEK_SET), (-choice.randrange(SIZE), os.SEEK_END)])
            assert disk.seek(*place) == model.seek(*place) == disk.tell()
            length = min(choice.randrange(50_000), SIZE - model.tell())
            what = choice.randrange(4)
            if what == 0:
                data = choice.randbytes(length)
                assert disk.write(data) == model.write(data)
            elif what == 1:
                assert disk.read(length) == model.read(length)
            elif what == 2:
                mine, its = bytearray(length), bytearray(length)
                assert disk.readinto(mine) == model.readinto(its)
                assert mine == its
            else:
                near = choice.randrange(-model.tell(), 1000)
                assert disk.seek(near, os.SEEK_CUR) == model.seek(near, os.SEEK_CUR)
        disk.seek(0)
        assert disk.readall() == model.getvalue()


def test_the_disk_has_an_end(qcow: Path) -> None:
    with tapfs.open_file(qcow, writable=True) as disk:
        disk.seek(-3, os.SEEK_END)
        assert disk.write(b"abcdef") == 3
        with pytest.raises(ImageError) as raised:
            disk.write(b"d")
        assert (raised.value.kind, raised.value.errno) == (ErrorKind.NO_SPACE, errno.ENOSPC)
        assert disk.read(5) == b""
        assert disk.seek(10, os.SEEK_END) == SIZE + 10
        assert disk.read() == b""
        assert disk.write(b"") == 0
        disk.seek(-3, os.SEEK_END)
        assert disk.read(1 << 40) == b"abc"
        for size in (0, SIZE + 1):
            with pytest.raises(io.UnsupportedOperation):
                disk.truncate(size)
        assert disk.truncate(SIZE) == SIZE
        with pytest.raises(OSError, match="Invalid argument"):
            disk.seek(-1)
        with pytest.raises(ValueError, match="whence"):
            disk.seek(0, 99)


def test_data_and_holes_are_found(qcow: Path) -> None:
    with tapfs.open_file(qcow, writable=True) as disk:
        for place in (1 << 20, 3 << 20):
            disk.seek(place)
            disk.write(b"x" * 65536)
        found = [disk.seek(0, os.SEEK_DATA)]
        found.append(disk.seek(found[-1], os.SEEK_HOLE))
        found.append(disk.seek(found[-1], os.SEEK_DATA))
        assert found == [1 << 20, (1 << 20) + 65536, 3 << 20]
        assert disk.seek((1 << 20) + 5, os.SEEK_DATA) == (1 << 20) + 5
        assert disk.tell() == (1 << 20) + 5
        for place, whence in ((SIZE, os.SEEK_DATA), (SIZE, os.SEEK_HOLE), (-1, os.SEEK_DATA), (SIZE - 9, os.SEEK_DATA)):
            with pytest.raises(OSError, match="No such device or address") as raised:
                disk.seek(place, whence)
            assert raised.value.errno == errno.ENXIO


def test_a_file_ends_with_data_where_the_disk_does(tmp_path: Path) -> None:
    (tmp_path / "full.raw").write_bytes(b"x" * 8192)
    with tapfs.open_file(tmp_path / "full.raw", format="raw") as disk:
        assert disk.seek(0, os.SEEK_HOLE) == 8192


def test_a_partition_is_a_file_of_its_own(partitioned: Path) -> None:
    with tapfs.open(partitioned, writable=True) as image:
        with image.open(partition=1) as part:
            assert (part.size, part.seek(0, os.SEEK_END)) == (LENGTH, LENGTH)
            part.seek(-2, os.SEEK_END)
            assert part.write(b"abc") == 2
            part.seek(0)
            part.write(b"start")
            assert part.seek(100_000, os.SEEK_DATA) == LENGTH - 4096
        assert image.read(START, 5) == b"start"
        assert image.read(START + LENGTH - 2, 3) == b"ab\0"
        with pytest.raises(FileNotFoundError, match="has no partition 2 with data; it has 1, 5"):
            image.open(partition=2)
    with tapfs.open_file(partitioned, partition=1) as part:
        assert part.read(5) == b"start"
    with pytest.raises(FileNotFoundError):
        tapfs.open_file(partitioned, partition=7)
    tapfs.open(partitioned, writable=True).close()  # nothing is locked any more


def test_a_read_only_file_refuses_to_write(qcow: Path) -> None:
    with tapfs.open_file(qcow) as disk:
        assert (disk.readable(), disk.writable(), disk.seekable(), disk.mode) == (True, False, True, "rb")
        with pytest.raises(io.UnsupportedOperation):
            disk.write(b"x")
        with pytest.raises(io.UnsupportedOperation):
            disk.fileno()


def test_closed_is_closed(qcow: Path) -> None:
    with tapfs.open(qcow, writable=True) as image:
        disk = image.open()
        assert repr(disk) == f"<tapfs.DiskFile of {str(qcow)!r}: {SIZE} bytes, mode 'rb+'>"
        disk.write(b"x")
        disk.close()
        disk.close()
        assert repr(disk).endswith("closed>")
        for call in (disk.read, disk.tell, disk.readall, disk.flush, disk.readable, lambda: disk.seek(0)):
            with pytest.raises(ValueError, match="closed file"):
                call()
        assert image.read(0, 1) == b"x"  # the image is still open
        left = image.open()
        left.write(b"y")
    left.close()  # the image was flushed and closed before
    with pytest.raises(ImageError, match="is closed"):
        image.open()


def test_flush_makes_durable_and_close_flushes(qcow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushes: list[str] = []
    with tapfs.open(qcow, writable=True) as image:
        real = image.flush
        monkeypatch.setattr(image, "flush", lambda: (flushes.append("flush"), real()))
        with image.open() as disk:
            disk.flush()
            disk.read(1)
            assert flushes == []  # nothing was written
            disk.write(b"x")
            disk.flush()
            assert flushes == ["flush"]
            disk.write(b"y")
        assert flushes == ["flush", "flush"]


def test_a_dropped_file_warns_as_its_image_does(qcow: Path) -> None:
    with pytest.warns(ResourceWarning, match="unclosed disk image"):
        tapfs.open_file(qcow)
    with tapfs.open(qcow) as image, warnings.catch_warnings():
        warnings.simplefilter("error")
        image.open()
    tapfs.open(qcow, writable=True).close()


def test_buffers_archives_and_others_read_it(qcow: Path) -> None:
    with tapfs.open_file(qcow, writable=True) as disk, io.BufferedRandom(disk) as buffered:
        with tarfile.open(fileobj=buffered, mode="w") as archive:
            entry = tarfile.TarInfo("hello")
            entry.size = 5
            archive.addfile(entry, io.BytesIO(b"world"))
        buffered.seek(1 << 20)
        buffered.write(b"line one\nline two\n")
    with tapfs.open_file(qcow) as disk, tarfile.open(fileobj=disk) as archive:
        member = archive.extractfile("hello")
        assert member is not None
        assert member.read() == b"world"
    with tapfs.open_file(qcow) as disk, io.BufferedReader(disk) as lines:
        lines.seek(1 << 20)
        assert [lines.readline(), lines.readline()] == [b"line one\n", b"line two\n"]


def test_a_zip_file_in_a_partition_is_read(partitioned: Path) -> None:
    with tapfs.open(partitioned, writable=True) as image, image.open(partition=1) as part:
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr("hello", "world")
        part.seek(LENGTH - len(packed.getvalue()))
        part.write(packed.getvalue())
    with tapfs.open_file(partitioned, partition=1) as part, zipfile.ZipFile(part) as archive:
        assert archive.read("hello") == b"world"
