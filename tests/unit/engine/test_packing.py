"""Codecs and the shapes of payloads: each codec against its reference, units larger than a granule, headers, slack."""

from __future__ import annotations

import itertools
import random
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from tapfs import ErrorKind, ImageError
from tapfs.driver import Codec, Geometry, Packing
from tapfs.extent import Extent, Kind
from tapfs.kernel.engine import HostDescriptor, compress
from tests.unit.engine.engine_disks import Disk, host, open_host, pattern

PAGE = 4096
UNIT_BYTES = 16 * PAGE
CODECS = [Codec.RAW_DEFLATE, Codec.ZLIB, Codec.ZSTD]


def by_zstd(data: bytes) -> bytes:
    return subprocess.run(["zstd", "-q", "-c", "-"], input=data, capture_output=True, check=True).stdout


def from_zstd(payload: bytes) -> bytes:
    return subprocess.run(["zstd", "-q", "-d", "-c", "-"], input=payload, capture_output=True, check=True).stdout


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush()


PACK: dict[Codec, Callable[[bytes], bytes]] = {
    Codec.RAW_DEFLATE: raw_deflate,
    Codec.ZLIB: zlib.compress,
    Codec.ZSTD: by_zstd,
}
UNPACK: dict[Codec, Callable[[bytes], bytes]] = {
    Codec.RAW_DEFLATE: lambda payload: zlib.decompress(payload, -15),
    Codec.ZLIB: zlib.decompress,
    Codec.ZSTD: from_zstd,
}


def text(length: int, seed: int) -> bytes:
    words = b" ".join(b"%d times %d" % (seed, number) for number in range(length // 8))
    return words[:length]


def add(disk: Disk, path: Path, packing: Packing, *, size: int = UNIT_BYTES, writable: bool = False) -> None:
    descriptor = open_host(path, direct=False)
    disk.descriptors.append(descriptor)
    files = [HostDescriptor(descriptor, str(path), writable=writable)]
    disk.add_layer(Geometry(size, PAGE, UNIT_BYTES, packing=packing), files=files, writable=writable)


def parts(payload_at: int, payload_length: int, *cuts: int) -> list[Extent]:
    """A packed unit as extents that are cut at these pages."""
    edges = [0, *(cut * PAGE for cut in cuts), UNIT_BYTES]
    return [
        Extent(start, stop - start, Kind.COMPRESSED, host_offset=payload_at, host_length=payload_length)
        for start, stop in itertools.pairwise(edges)
    ]


@pytest.mark.parametrize("codec", CODECS)
def test_what_the_reference_packed_is_read(tmp_path: Path, codec: Codec) -> None:
    data = text(UNIT_BYTES, 3)
    payload = PACK[codec](data)
    slack = b"\xff" * 700
    with Disk() as disk:
        add(disk, host(tmp_path, "a", bytes(100) + payload + slack), Packing(codec, UNIT_BYTES))
        disk.install(0, parts(100, len(payload) + len(slack)))
        assert disk.read(0, UNIT_BYTES) == data
        assert disk.read(5 * PAGE + 77, PAGE) == data[5 * PAGE + 77 :][:PAGE]


SKIPPABLE = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"stray"


def by_stream(data: bytes, *words: str) -> bytes:
    """A frame that does not say how long its contents are."""
    return subprocess.run(["zstd", "-q", "-c", *words], input=data, capture_output=True, check=True).stdout


ZSTD_DATA = text(UNIT_BYTES, 9)
ZSTD_PAYLOADS = {
    "two frames": by_zstd(ZSTD_DATA[: 3 * PAGE]) + by_zstd(ZSTD_DATA[3 * PAGE :]),
    "skippable frames": SKIPPABLE + by_zstd(ZSTD_DATA[:PAGE]) + SKIPPABLE + by_zstd(ZSTD_DATA[PAGE:]),
    "no length": by_stream(ZSTD_DATA, "--no-check"),
    "checksum": by_stream(ZSTD_DATA, "--check"),
}


@pytest.mark.parametrize("kind", ZSTD_PAYLOADS)
def test_zstd_frames_of_every_shape_are_read(tmp_path: Path, kind: str) -> None:
    payload = ZSTD_PAYLOADS[kind] + b"\xff" * 333
    with Disk() as disk:
        add(disk, host(tmp_path, "a", payload), Packing(Codec.ZSTD, UNIT_BYTES))
        disk.install(0, parts(0, len(payload)))
        assert disk.read(0, UNIT_BYTES) == ZSTD_DATA
        assert disk.read(3 * PAGE - 5, 99) == ZSTD_DATA[3 * PAGE - 5 : 3 * PAGE + 94]


@pytest.mark.parametrize("kind", ["longer", "cut", "checksum"])
def test_zstd_frames_that_do_not_end_with_the_unit_are_damaged(tmp_path: Path, kind: str) -> None:
    whole = by_stream(ZSTD_DATA, "--check")
    payload = {
        "longer": by_stream(ZSTD_DATA + b"x"),
        "cut": by_stream(ZSTD_DATA, "--no-check")[:-3],
        "checksum": whole[:-1] + bytes([whole[-1] ^ 1]),
    }[kind]
    with Disk() as disk:
        add(disk, host(tmp_path, "a", payload), Packing(Codec.ZSTD, UNIT_BYTES))
        disk.install(0, parts(0, len(payload)))
        with pytest.raises(ImageError) as raised:
            disk.read(0, PAGE)
        assert raised.value.kind is ErrorKind.CORRUPT


@pytest.mark.parametrize("codec", CODECS)
def test_what_is_packed_the_reference_reads(codec: Codec) -> None:
    data = text(4 * PAGE, 1) + bytes(PAGE) + pattern(PAGE)
    packed = compress(codec, data, PAGE)
    for index, payload in enumerate(packed):
        granule = data[index * PAGE : (index + 1) * PAGE]
        if payload is not None:
            assert len(payload) < PAGE
            assert UNPACK[codec](payload) == granule
    assert all(payload is not None for payload in packed[:5])


@pytest.mark.parametrize("codec", CODECS)
def test_a_damaged_payload_is_said_to_be_one(tmp_path: Path, codec: Codec) -> None:
    payload = bytearray(PACK[codec](text(UNIT_BYTES, 4)))
    payload[:1] = b"\x07"  # no magic, and no kind of block of deflate
    short = PACK[codec](text(PAGE, 4))
    for name, content in (("damaged", bytes(payload)), ("short", short), ("empty", bytes(64))):
        with Disk() as disk:
            add(disk, host(tmp_path, name, content), Packing(codec, UNIT_BYTES))
            disk.install(0, parts(0, len(content)))
            with pytest.raises(ImageError) as raised:
                disk.read(0, PAGE)
            assert raised.value.kind is ErrorKind.CORRUPT


def test_a_unit_may_be_mapped_in_parts(tmp_path: Path) -> None:
    """A write into the middle of a packed unit leaves the rest of it packed."""
    data = text(UNIT_BYTES, 5)
    payload = zlib.compress(data)
    with Disk() as disk:
        add(disk, host(tmp_path, "a", payload.ljust(2 * PAGE, b"\0")), Packing(Codec.ZLIB, UNIT_BYTES), writable=True)
        disk.install(0, parts(0, len(payload), 3, 9))
        assert disk.read(0, UNIT_BYTES) == data
        place = Extent(6 * PAGE, 2 * PAGE, Kind.DATA, host_offset=2 * PAGE, in_place=True)
        disk.patch(0, [place])
        disk.put(b"n" * 2 * PAGE, 6 * PAGE)
        assert disk.read(0, UNIT_BYTES) == data[: 6 * PAGE] + b"n" * 2 * PAGE + data[8 * PAGE :]


def test_an_extent_over_two_packed_units_is_refused(tmp_path: Path) -> None:
    with Disk() as disk:
        add(disk, host(tmp_path, "a", bytes(PAGE)), Packing(Codec.ZLIB, 4 * PAGE))
        across = [
            Extent(0, 2 * PAGE, Kind.ZERO),
            Extent(2 * PAGE, 4 * PAGE, Kind.COMPRESSED, host_length=9),
            Extent(6 * PAGE, UNIT_BYTES - 6 * PAGE, Kind.ZERO),
        ]
        with pytest.raises(ImageError):
            disk.install(0, across)


@pytest.mark.parametrize("length_bytes", [4, 8])
def test_the_length_may_stand_in_the_payloads_own_header(tmp_path: Path, length_bytes: int) -> None:
    """As in a streamOptimized VMDK: the table gives the place of a marker, and the marker the length."""
    data = text(UNIT_BYTES, 6)
    payload = zlib.compress(data)
    marker = (7).to_bytes(8, "little") + len(payload).to_bytes(length_bytes, "little")
    packing = Packing(Codec.ZLIB, UNIT_BYTES, header_bytes=8 + length_bytes, length_at=8, length_bytes=length_bytes)
    with Disk() as disk:
        # What follows is another stream, which must not be taken for a part of this one.
        add(disk, host(tmp_path, "a", marker + payload + payload), packing)
        disk.install(0, parts(0, UNIT_BYTES))
        assert disk.read(0, UNIT_BYTES) == data
    for wrong in (len(payload) * 2 + 100, 2**31, 0):
        broken = marker[:8] + wrong.to_bytes(length_bytes, "little")
        with Disk() as disk:
            add(disk, host(tmp_path, "b", broken + payload), packing)
            disk.install(0, parts(0, UNIT_BYTES))
            with pytest.raises(ImageError) as raised:
                disk.read(0, 1)
            assert raised.value.kind is ErrorKind.CORRUPT


@pytest.mark.parametrize(
    "packing",
    [
        Packing(Codec.ZLIB, 3 * PAGE),  # no part of the map unit
        Packing(Codec.ZLIB, PAGE + 512),
        Packing(Codec.ZLIB, UNIT_BYTES, header_bytes=8, length_at=5, length_bytes=4),
        Packing(Codec.ZLIB, UNIT_BYTES, header_bytes=8, length_at=0, length_bytes=3),
        Packing(Codec.ZLIB, UNIT_BYTES, header_bytes=8),
    ],
)
def test_a_packing_that_cannot_be_is_refused(tmp_path: Path, packing: Packing) -> None:
    with Disk() as disk, pytest.raises(ImageError):
        add(disk, host(tmp_path, "a"), packing)


def test_the_last_payload_may_end_with_the_disk(tmp_path: Path) -> None:
    """As qemu-img packs the last grain of a streamOptimized VMDK; anywhere else a short payload is damage."""
    data = text(UNIT_BYTES, 7)
    size = 3 * UNIT_BYTES - 700
    short = zlib.compress(data[: UNIT_BYTES - 700])
    for at, length in ((2, len(short)), (1, len(short))):
        with Disk() as disk:
            packing = Packing(Codec.ZLIB, UNIT_BYTES)
            add(disk, host(tmp_path, "a", short), packing, size=size)
            disk.install(0, [Extent(at * UNIT_BYTES, UNIT_BYTES, Kind.COMPRESSED, 0, 0, length)])
            if at == 2:
                assert disk.read(2 * UNIT_BYTES, UNIT_BYTES - 700) == data[: UNIT_BYTES - 700]
                continue
            with pytest.raises(ImageError) as raised:
                disk.read(UNIT_BYTES, 1)
            assert raised.value.kind is ErrorKind.CORRUPT


@pytest.mark.parametrize(("codec", "granule"), [(Codec.RAW_DEFLATE, 4096), (Codec.ZLIB, 4096), (Codec.ZLIB, 65536)])
def test_random_bytes_do_not_shrink_and_repeated_ones_do(codec: Codec, granule: int) -> None:
    """Where all bytes are equally frequent, strings that come again still make a granule shorter."""
    chance = random.Random(granule)
    noise = chance.randbytes(granule)
    again = chance.randbytes(granule // 4) * 4
    record = chance.randbytes(40)
    records = b"".join(chance.randbytes(60) + record for _ in range(granule // 100 + 1))[:granule]
    eighth = granule // 8
    late = noise[:-eighth] + noise[-2 * eighth : -eighth]
    tail = noise[: granule // 2] + b"tail" * (granule // 8)
    noise_packed, *others = compress(codec, b"".join([noise, again, records, late, tail]), granule)
    assert noise_packed is None
    for granule_bytes, payload in zip([again, records, late, tail], others, strict=True):
        assert payload is not None
        assert len(payload) < granule
        assert UNPACK[codec](payload) == granule_bytes
