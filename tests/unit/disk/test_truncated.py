"""An image file that somebody truncates while it is open: what is lost is an error, never zeros."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import tapfs
from tapfs import ErrorKind, Image, ImageError
from tapfs.driver import Severity
from tests.conftest import REPOSITORY

SIZE = 4 << 20
#: A piece of guest data: every other one is there.
PIECE = 32 << 10
SECTOR = 512


def guest_byte(offset: int) -> int:
    piece = offset // PIECE
    return 0 if piece % 2 else piece % 255 + 1


def filled(path: Path, name: str, password: bytes | None = None) -> Path:
    tapfs.create(str(path), name, SIZE, password=password)
    with tapfs.open(path, format=name, writable=True, password=password) as disk:
        for offset in range(0, SIZE, 2 * PIECE):
            disk.write(offset, bytes([guest_byte(offset)]) * PIECE)
    return path


def raw(folder: Path) -> Path:
    return filled(folder / "raw", "raw")


def qcow(folder: Path) -> Path:
    return filled(folder / "qcow", "qcow")


def encrypted(folder: Path) -> Path:
    return filled(folder / "encrypted", "qcow", b"word")


def compressed(folder: Path) -> Path:
    target = folder / "compressed"
    words = [sys.executable, "-m", "tapfs.cli", "convert", "-c", "-f", "raw", "-O", "qcow", raw(folder), target]
    subprocess.run(words, check=True, cwd=REPOSITORY)
    return target


IMAGES = [raw, qcow, encrypted, compressed]


def opened(path: Path, *, writable: bool = False, direct: bool = False) -> Image:
    password = b"word" if path.name == "encrypted" else None
    name = "raw" if path.name == "raw" else "qcow"
    return tapfs.open(path, format=name, writable=writable, direct=direct, password=password)


def met(call: Callable[[], object]) -> ImageError | None:
    """The error of a call."""
    try:
        call()
    except ImageError as error:
        return error
    return None


def require_lost(error: ImageError | None) -> None:
    assert error is not None
    assert (error.kind, error.errno) == (ErrorKind.IO, errno.EIO)
    assert "truncated" in str(error)


def lost_pieces(disk: Image) -> int:
    """How many pieces of the disk are errors; the others are as they were."""
    lost = 0
    for offset in range(0, SIZE, PIECE):
        buffer = bytearray(PIECE)
        error = met(lambda offset=offset, buffer=buffer: disk.read_into(offset, buffer))  # type: ignore[misc]
        if error is None:
            assert buffer == bytes([guest_byte(offset)]) * PIECE, hex(offset)
        else:
            require_lost(error)
            lost += 1
    return lost


@pytest.mark.parametrize("make", IMAGES)
@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("started", [False, True])
def test_reads_of_what_is_lost_fail(
    tmp_path: Path, make: Callable[[Path], Path], *, direct: bool, started: bool
) -> None:
    path = make(tmp_path)
    length = path.stat().st_size
    for kept in (length - 1, length - SECTOR, length // 2 + 100, length // 2, 4096, 0):
        copy = tmp_path / "copy" / path.name
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
        with opened(copy, direct=direct) as disk:
            if started:  # the engine knows the length, and no map but of the first unit
                disk.read(0, 1)
            os.truncate(copy, kept)
            lost = lost_pieces(disk)
            # Where the engine starts later, it finds a file that the drivers have seen longer. The last sector of a
            # compressed image may be slack behind its last payload.
            assert (
                lost == SIZE // PIECE if not started else lost > 0 or (make is compressed and kept >= length - SECTOR)
            )
            if kept == 0:
                assert lost >= SIZE // PIECE // 2 - 1


def test_a_map_does_not_take_what_is_lost_for_a_hole(tmp_path: Path) -> None:
    """Else convert would copy zeros and say that all went well."""
    path = raw(tmp_path)
    with opened(path) as disk:
        list(disk.extents())
        os.truncate(path, SIZE // 2)
        require_lost(met(lambda: list(disk.extents())))


@pytest.mark.parametrize("make", [raw, qcow, encrypted])
@pytest.mark.parametrize("direct", [False, True])
def test_a_write_that_makes_the_file_longer_again_does_not_make_zeros_of_what_is_lost(
    tmp_path: Path, make: Callable[[Path], Path], *, direct: bool
) -> None:
    path = make(tmp_path)
    disk = opened(path, writable=True, direct=direct)
    assert lost_pieces(disk) == 0
    os.truncate(path, 64 << 10)
    lost = lost_pieces(disk)
    assert lost > 0
    # In place, where it is the last that the file has had.
    met(lambda: disk.write(SIZE - 2 * PIECE, bytes([guest_byte(SIZE - 2 * PIECE)]) * PIECE))
    assert lost_pieces(disk) >= lost - 1
    require_lost(met(disk.flush))
    require_lost(met(disk.close))


@pytest.mark.parametrize("direct", [False, True])
def test_a_flush_finds_what_nobody_has_read(tmp_path: Path, *, direct: bool) -> None:
    path = qcow(tmp_path)
    disk = opened(path, writable=True, direct=direct)
    disk.write(0, b"first")
    os.truncate(path, 64 << 10)
    for _ in range(2):
        require_lost(met(disk.flush))
    disk.abandon()


def test_a_parent_that_is_truncated(tmp_path: Path) -> None:
    parent = qcow(tmp_path)
    overlay = tmp_path / "overlay"
    tapfs.create(str(overlay), "qcow", backing=str(parent), backing_format="qcow")
    with tapfs.open(overlay, writable=True) as disk:
        assert lost_pieces(disk) == 0
        os.truncate(parent, parent.stat().st_size // 2)
        lost = lost_pieces(disk)
        assert lost > 0
        # A part of a cluster cannot be written where the rest of it is lost.
        require_lost(met(lambda: disk.write(SIZE - 2 * PIECE + 100, b"x")))
        # What lies in the overlay itself is safe.
        disk.write(SIZE - 2 * PIECE, bytes([guest_byte(SIZE - 2 * PIECE)]) * PIECE)
        disk.flush()
        assert lost_pieces(disk) == lost - 1


def test_zeros_that_were_never_written_stay_zeros(tmp_path: Path) -> None:
    """The file may end before its last cluster does, and grows by what is written."""
    path = tmp_path / "qcow"
    tapfs.create(str(path), "qcow", SIZE)
    with tapfs.open(path, writable=True) as disk:
        for number in range(64):
            disk.write(number * 8192 + 100, b"x")
            assert disk.read(number * 8192, 8192) == (bytes(100) + b"x").ljust(8192, b"\0")
        disk.flush()


def test_check_says_that_the_last_cluster_lacks_its_end(tmp_path: Path) -> None:
    path = qcow(tmp_path)
    assert tapfs.check(path).findings == []
    length = path.stat().st_size
    os.truncate(path, length - 700)
    report = tapfs.check(path)
    (note,) = report.findings
    assert (report.corruptions, note.severity, note.host_offset) == (0, Severity.NOTE, length - 700)
    assert "lacks its last 700 bytes: they read as zeros" in note.message
    # As others read it.
    with tapfs.open(path) as disk:
        ours = disk.read(0, SIZE)
    flat = tmp_path / "flat"
    subprocess.run(["qemu-img", "convert", "-f", "qcow", "-O", "raw", path, flat], check=True)
    assert flat.read_bytes() == ours
    # Beyond a cluster it is a damage.
    os.truncate(path, length - 4096)
    assert tapfs.check(path).corruptions == 1
