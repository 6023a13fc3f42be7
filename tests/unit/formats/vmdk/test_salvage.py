"""Salvage of VMDKs: downloads that broke off, lost headers, lost directories."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import tapfs
from tapfs.disk.open_options import OpenOptions
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Range
from tapfs.jobs.salvage import Salvaged, open_salvaged
from tapfs.jobs.sources import Salvaged as SalvagedSource
from tapfs.kernel.ranges import ranges_of
from tapfs.salvage import SalvageRequest

MIB = 1 << 20
#: Two grain tables, so that directories have more than an entry.
SIZE = 40 * MIB
GRAIN = 65536


def content(seed: int = 1) -> bytes:
    chosen = random.Random(seed)
    disk = bytearray(SIZE)
    for _ in range(40):
        at = chosen.randrange(SIZE // 4096) * 4096
        disk[at : at + 4096] = chosen.randbytes(2048) + bytes(2048)
    disk[-512:] = chosen.randbytes(512)
    return bytes(disk)


@pytest.fixture
def packed(tmp_path: Path) -> tuple[Path, bytes]:
    raw, path, disk = tmp_path / "disk.raw", tmp_path / "disk.vmdk", content()
    raw.write_bytes(disk)
    options = {"subformat": "streamOptimized"}
    tapfs.convert(raw, path, target_format="vmdk", format="raw", options=options)
    return path, disk


@pytest.fixture
def sparse(tmp_path: Path) -> tuple[Path, bytes]:
    path, disk = tmp_path / "disk.vmdk", content(2)
    tapfs.create(path, "vmdk", SIZE)
    with tapfs.open(path, writable=True) as image:
        image.write(0, disk)
    return path, disk


def opened(path: Path, **known: object) -> Salvaged:
    return open_salvaged(str(path), OpenOptions(format="vmdk", salvage=SalvageRequest(**known)))  # type: ignore[arg-type]


def read_all(salvaged: Salvaged) -> tuple[bytes, list[Range]]:
    """The disk with zeros for what is lost, and what is lost."""
    with salvaged.image as image:
        source, buffer = SalvagedSource(image), bytearray(image.size)
        source.read_ranges(ranges_of([Range(0, image.size)], image.size), buffer)
        return bytes(buffer), [place for place, _ in source.lost]


def overwrite(path: Path, offset: int, written: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(written)


def test_a_download_that_broke_off_has_the_grains_before(packed: tuple[Path, bytes]) -> None:
    path, disk = packed
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(ImageError):
        tapfs.open(path)
    salvaged = opened(path)
    found, lost = read_all(salvaged)
    last = int(salvaged.found.doubts[0].rpartition("of byte ")[2].split()[0])
    assert 0 < last < SIZE
    assert lost == []
    assert found[: last + GRAIN] == disk[: last + GRAIN]
    assert not any(found[last + GRAIN :])


def test_a_packed_extent_without_header_has_every_grain(packed: tuple[Path, bytes]) -> None:
    path, disk = packed
    overwrite(path, 0, bytes(512))
    salvaged = opened(path)
    assert read_all(salvaged) == (disk, [])
    assert salvaged.found.doubts == ()


def test_damage_between_grains_is_told(packed: tuple[Path, bytes]) -> None:
    path, disk = packed
    size = path.stat().st_size
    overwrite(path, size // 2 // 512 * 512, random.Random(3).randbytes(3 * 512))
    with path.open("r+b") as file:
        file.truncate(size - 1024)
    salvaged = opened(path)
    found, lost = read_all(salvaged)
    wrong = [at for at in range(0, SIZE, GRAIN) if found[at : at + GRAIN] != disk[at : at + GRAIN]]
    assert 0 < len(wrong) <= 3
    told = lost or salvaged.found.unplaced
    assert told
    assert all(not any(found[at : at + GRAIN]) for at in wrong)


def test_a_sparse_extent_without_header_is_found_by_its_descriptor(sparse: tuple[Path, bytes]) -> None:
    path, disk = sparse
    overwrite(path, 0, bytes(512))
    assert read_all(opened(path)) == (disk, [])


def test_a_text_that_begins_as_that_of_kiwi_is_found_without_header(sparse: tuple[Path, bytes]) -> None:
    """It has `encoding` before the first line."""
    path, disk = sparse
    text = b'encoding="UTF-8"\n' + path.read_bytes()[512 : 21 * 512].split(b"\0", 1)[0]
    overwrite(path, 0, bytes(512) + text)
    assert read_all(opened(path)) == (disk, [])


def test_a_sparse_extent_without_descriptor_needs_a_size(sparse: tuple[Path, bytes]) -> None:
    path, _ = sparse
    overwrite(path, 0, bytes(21 * 512))
    with pytest.raises(ImageError) as caught:
        opened(path)
    assert caught.value.kind is ErrorKind.INVALID_FORMAT


def test_entries_that_both_directories_have_lost_follow_from_the_others(sparse: tuple[Path, bytes]) -> None:
    path, disk = sparse
    head = path.read_bytes()[:512]
    for at in (48, 56):
        place = int.from_bytes(head[at : at + 8], "little") * 512
        overwrite(path, place + 4, b"\xff" * 4)
    salvaged = opened(path)
    assert salvaged.found.rebuilt == ("1 entries of the grain directory, because its tables lie behind each other",)
    assert read_all(salvaged) == (disk, [])


def test_sound_images_are_read_as_they_are(packed: tuple[Path, bytes]) -> None:
    path, disk = packed
    salvaged = opened(path)
    assert (salvaged.found.rebuilt, salvaged.found.doubts) == ((), ())
    assert read_all(salvaged) == (disk, [])


def test_noise_is_no_vmdk(tmp_path: Path) -> None:
    path = tmp_path / "disk.vmdk"
    path.write_bytes(random.Random(4).randbytes(MIB))
    for known in ({}, {"virtual_size": 10 * MIB}, {"virtual_size": 10 * MIB, "cluster_bytes": 1000}):
        with pytest.raises(ImageError):
            opened(path, **known)
