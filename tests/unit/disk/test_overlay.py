"""Scratch writes by the Python API."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import tapfs
from tests.conftest import sha256_of

KIB, GIB = 1 << 10, 1 << 30


@pytest.mark.parametrize("name", ["scratch", None])
def test_open_over(tmp_path: Path, sample: Path, name: str | None) -> None:
    before = sha256_of(sample)
    overlay = None if name is None else tmp_path / name
    with tapfs.open(sample, overlay=overlay, temporary=name is None) as disk:
        assert disk.writable
        assert disk.parents == (str(sample),)
        disk.write(700 * KIB + 5, b"scratch")
        disk.flush()
        assert disk.read(700 * KIB, 12)[5:] == b"scratch"
        assert disk.read(0, disk.size)[: 700 * KIB] == sample.read_bytes()[: 700 * KIB]
    assert sha256_of(sample) == before
    assert [path.name for path in tmp_path.iterdir()] == ([] if name is None else [name])
    if overlay is not None:
        with tapfs.open(sample, overlay=overlay) as disk:
            assert disk.read(700 * KIB + 5, 7) == b"scratch"


@pytest.mark.parametrize("size", [1, 512, 1 << 40, (1 << 40) + 1, 8 << 40])
def test_disks_of_any_size(tmp_path: Path, size: int) -> None:
    image, overlay = tmp_path / "image", tmp_path / "scratch"
    image.touch()
    os.truncate(image, size)
    with tapfs.open(image, overlay=overlay) as disk:
        assert disk.size == -(-size // 512) * 512
        disk.write(disk.size - 1, b"x")
    assert overlay.stat().st_blocks * 512 < 16 << 20
    with tapfs.open(image, overlay=overlay) as disk:
        assert disk.read(disk.size - 1, 1) == b"x"


def test_a_temporary_goes_when_the_opening_fails(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    descriptors = len(os.listdir("/proc/self/fd"))
    for overlay in (None, tmp_path / "scratch"):
        with pytest.raises(tapfs.ImageError, match="No such file"):
            tapfs.open(missing, overlay=overlay, temporary=overlay is None)
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_every_file_is_closed(tmp_path: Path, sample: Path) -> None:
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"garbage" * 100)
    descriptors = len(os.listdir("/proc/self/fd"))
    for overlay in (garbage, sample, tmp_path, "a\0b"):
        with pytest.raises(tapfs.ImageError):
            tapfs.open(sample, overlay=overlay)
    tapfs.open(sample, temporary=True).close()
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_ram(ram_name: str, tmp_path: Path) -> None:
    tapfs.create(ram_name, "ram", GIB)
    for _ in range(2):
        with tapfs.open(ram_name, overlay=tmp_path / "scratch") as disk:
            disk.write(12345, b"scratch")
    with tapfs.open(ram_name) as disk:
        assert disk.read(12345, 7) == bytes(7)
