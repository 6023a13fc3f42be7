"""Resizing: space for what is added, LUKS containers, and what a shrink leaves behind the new end."""

from __future__ import annotations

from pathlib import Path

import pytest

import tapfs
from tapfs.errors import ErrorKind, ImageError

MIB = 1 << 20
PASSWORD = b"a password"
#: A key slot that is tried in no time.
FAST = {"iter-time": "10"}

KINDS: dict[str, dict[str, str]] = {
    "plain": {},
    "small clusters": {"cluster_size": "512"},
    "subclusters": {"extended_l2": "on"},
    "version 2": {"compat": "0.10"},
    "raw data file": {"data_file": "outside", "data_file_raw": "on"},
}
MORE = [("plain", "full"), ("plain", "falloc"), ("raw data file", "falloc")]


def data_bytes(path: Path) -> int:
    with tapfs.open(path) as disk:
        return sum(each.length for each in disk.extents() if each.data)


@pytest.mark.parametrize(("kind", "mode"), [*((kind, "metadata") for kind in KINDS), *MORE])
def test_what_is_added_gets_its_place(tmp_path: Path, kind: str, mode: str) -> None:
    path = tmp_path / "a.qcow2"
    tapfs.create(path, "qcow2", MIB, options=KINDS[kind])
    with tapfs.open(path, writable=True) as disk:
        disk.write(0, b"data" * (MIB // 4))
        disk.discard(MIB // 2, MIB // 4)  # free clusters, which hold what they held
    tapfs.resize(path, 3 * MIB + 512, preallocation=mode)
    assert (tapfs.check(path).corruptions, tapfs.check(path).leaks) == (0, 0)
    assert data_bytes(path) >= 2 * MIB + 512 + (MIB // 4 * 3)
    with tapfs.open(path) as disk:
        assert disk.read(MIB, disk.size - MIB) == bytes(2 * MIB + 512)
    file = tmp_path / "outside" if kind == "raw data file" else path
    allocated = file.stat().st_blocks * 512
    assert (allocated < 2 * MIB) == (mode == "metadata")
    with tapfs.open(path, writable=True) as disk:
        disk.write(2 * MIB - 5, b"0123456789")
    with tapfs.open(path) as disk:
        assert disk.read(2 * MIB - 6, 12) == b"\x000123456789\0"


def test_an_image_with_a_data_file_or_a_cipher_takes_zeros_only(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    tapfs.create(path, "qcow2", MIB, options={"data_file": "outside"})
    with pytest.raises(ImageError, match="off or full"):
        tapfs.resize(path, 2 * MIB, preallocation="metadata")
    tapfs.resize(path, 2 * MIB, preallocation="full")
    assert data_bytes(path) == MIB


def test_a_shrink_zeroes_the_end_of_the_last_cluster(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    tapfs.create(path, "qcow2", MIB)
    with tapfs.open(path, writable=True) as disk:
        disk.write(0, b"secret" * 40_000)
    tapfs.resize(path, 100_352, shrink=True)
    held = path.read_bytes()
    assert held.count(b"secret") == 100_352 // 6
    assert (tapfs.check(path).corruptions, tapfs.check(path).leaks) == (0, 0)


@pytest.mark.parametrize("options", [{}, {"data_file": "outside"}, KINDS["raw data file"]])
def test_a_disk_that_ends_inside_a_cluster_grows_again(tmp_path: Path, options: dict[str, str]) -> None:
    """A data file ends with the disk, and not with the last cluster."""
    path = tmp_path / "a.qcow2"
    tapfs.create(path, "qcow2", MIB, options=options)
    with tapfs.open(path, writable=True) as disk:
        disk.write(0, b"data" * (MIB // 4))
    tapfs.resize(path, 100_352, shrink=True)
    tapfs.resize(path, MIB)
    assert (tapfs.check(path).corruptions, tapfs.check(path).leaks) == (0, 0)
    with tapfs.open(path) as disk:
        assert disk.read(0, MIB) == (b"data" * (100_352 // 4)).ljust(MIB, b"\0")


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("luks") / "a.luks"
    tapfs.create(path, "luks", MIB, options=FAST, password=PASSWORD)
    with tapfs.open(path, format="luks", writable=True, password=PASSWORD) as disk:
        disk.write(0, b"data" * (MIB // 4))
    return path.read_bytes()


def test_a_bare_container_of_luks(tmp_path: Path, container: bytes) -> None:
    path = tmp_path / "a.luks"
    path.write_bytes(container)
    with pytest.raises(ImageError) as refused:
        tapfs.resize(path, 2 * MIB, format="luks")
    assert (refused.value.kind, path.stat().st_size) == (ErrorKind.DENIED, len(container))
    with pytest.raises(ImageError, match="whole sectors of 512"):
        tapfs.resize(path, MIB + 5, format="luks", password=PASSWORD)
    expected = b"data" * (MIB // 4)
    for size in (3 * MIB + 512, MIB // 2, 2 * MIB):
        assert tapfs.resize(path, size, format="luks", password=PASSWORD, shrink=True) == size
        assert path.stat().st_size == len(container) - MIB + size
        expected = expected[:size].ljust(size, b"\0")
        with tapfs.open(path, format="luks", password=PASSWORD) as disk:
            assert disk.read(0, disk.size) == expected
