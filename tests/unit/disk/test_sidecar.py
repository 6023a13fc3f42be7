"""Sidecars: the tree is that of docs/specs/sidecar.md, and every damaged byte that is needed is known."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from blake3 import blake3

import tapfs
from tapfs.disk.sidecar import Sidecar
from tapfs.errors import ErrorKind, ImageError
from tapfs.jobs.hashing import write_sidecar

_LEAF = 4096


def _hashed(disk: bytes, path: Path, leaf: int = _LEAF) -> Path:
    image = path / "disk.raw"
    image.write_bytes(disk)
    sidecar = path / "disk.hash"
    with tapfs.open(image, format="raw") as opened:
        write_sidecar(opened, str(sidecar), leaf_bytes=leaf, overwrite=True)
    return sidecar


def _naive_root(disk: bytes, leaf: int) -> bytes:
    """The root by the specification, with nothing left out."""

    def digest(data: bytes) -> bytes:
        return blake3(data).digest() if any(data) else bytes(32)

    level = [digest(disk[at : at + leaf]) for at in range(0, len(disk), leaf)]
    while True:
        packed = b"".join(level)
        blocks = [packed[at : at + 4096].ljust(4096, b"\0") for at in range(0, max(1, len(packed)), 4096)]
        level = [digest(block) for block in blocks]
        if len(level) == 1:
            break
    shape = struct.pack("<QI", len(disk), leaf)
    return blake3(shape + level[0], derive_key_context="tapfs 2026 sidecar version 1 root").digest()


def _all_digests(path: Path) -> list[bytes]:
    with Sidecar(str(path)) as sidecar:
        return [sidecar.digest_of(leaf) for leaf in range(200)]


@pytest.mark.parametrize("size", [0, 512, _LEAF, _LEAF + 512, 128 * _LEAF, 129 * _LEAF - 1024])
def test_the_root_is_that_of_the_specification(tmp_path: Path, size: int) -> None:
    disk = (os.urandom(_LEAF) + bytes(2 * _LEAF))[:size].ljust(size, b"x")
    with Sidecar(str(_hashed(disk, tmp_path))) as sidecar:
        assert sidecar.hashed.root == _naive_root(disk, _LEAF)


def test_a_tree_of_three_levels_with_long_runs_of_zeros(tmp_path: Path) -> None:
    """128 * 128 leaves fill two levels; the last leaves of all make a third one."""
    disk = bytearray(16500 * _LEAF)
    for leaf in (0, 300, 301, 12800, 16499):
        disk[leaf * _LEAF + 5] = 1
    path = _hashed(bytes(disk), tmp_path)
    assert path.stat().st_blocks * 512 < path.stat().st_size // 10
    with Sidecar(str(path)) as sidecar:
        assert sidecar.hashed.root == _naive_root(bytes(disk), _LEAF)
        assert list(sidecar.written_leaves(0, 16500)) == [0, 300, 301, 12800, 16499]
        assert list(sidecar.written_leaves(301, 12800)) == [301]
        assert sidecar.digest_of(300) == blake3(disk[300 * _LEAF : 301 * _LEAF]).digest()
        assert sidecar.digest_of(7) == bytes(32)


def test_every_damaged_byte_is_known(tmp_path: Path) -> None:
    path = _hashed(os.urandom(200 * _LEAF), tmp_path)
    whole = path.read_bytes()
    assert len(whole) == 4096 * 4  # header, two blocks of leaves, one above
    used = [*range(128 + 48), *range(4096, 4096 + 200 * 32, 997), *range(3 * 4096, 3 * 4096 + 64, 7), len(whole) - 1]
    for at in used:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ImageError) as caught:
            _all_digests(path)
        assert caught.value.path == str(path)
        assert caught.value.kind in {ErrorKind.CORRUPT, ErrorKind.INVALID_FORMAT, ErrorKind.UNSUPPORTED}, at


@pytest.mark.parametrize("length", [0, 7, 100, 150, 4096, 3 * 4096, 4 * 4096 + 1])
def test_a_sidecar_of_another_length_is_refused(tmp_path: Path, length: int) -> None:
    path = _hashed(os.urandom(200 * _LEAF), tmp_path)
    os.truncate(path, length)
    with pytest.raises(ImageError) as caught:
        Sidecar(str(path))
    assert caught.value.kind is (ErrorKind.INVALID_FORMAT if length < 8 else ErrorKind.CORRUPT)


def test_a_missing_sidecar_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ImageError) as caught:
        Sidecar(str(tmp_path / "missing"))
    assert caught.value.kind is ErrorKind.NOT_FOUND
    assert "tapfs hash" in str(caught.value)


def test_without_the_library_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "blake3", None)
    with pytest.raises(ImageError) as caught:
        _hashed(b"x" * 512, tmp_path)
    assert caught.value.kind is ErrorKind.UNSUPPORTED
    assert "tapfs[hash]" in str(caught.value)


def test_a_leaf_that_cannot_be_is_refused(tmp_path: Path) -> None:
    for leaf in (0, 512, 5000, 2 << 20):
        with pytest.raises(ImageError) as caught:
            _hashed(b"x" * 512, tmp_path, leaf)
        assert caught.value.kind is ErrorKind.INVALID_ARGUMENT


def test_the_digest_is_blake3() -> None:
    """The first of the published test vectors."""
    from tapfs.disk.blake3_digests import blake3_digest

    assert blake3_digest()(b"").hex() == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
