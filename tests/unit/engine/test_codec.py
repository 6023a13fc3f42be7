"""Compressed granules and the cipher, against zlib and the OpenSSL command line."""

from __future__ import annotations

import hashlib
import os
import random
import zlib
from pathlib import Path

import pytest

from tapfs.driver import Codec, Geometry, Identity, Packing
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Extent, Kind
from tapfs.kernel.engine import HostDescriptor, Status, compress
from tests.unit.engine.engine_disks import AES, GRANULE, UNIT, Disk, extents, filled, host, packed, pattern, place
from tests.unit.engine.small_window import unpacked

DATA, ZERO, UNALLOCATED, COMPRESSED, _ = Kind


def deflate(data: bytes) -> bytes:
    """Raw deflate as zlib writes it with window bits -12."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -12)
    return packer.compress(data) + packer.flush()


def text(length: int, seed: int) -> bytes:
    """Compressible bytes whose repetitions lie up to tens of KiB apart."""
    words = [hashlib.sha256(bytes([seed, i])).hexdigest().encode() for i in range(200)]
    return b" ".join(words[(i * i + seed) % 200] for i in range(length // 64 + 1))[:length]


@pytest.mark.parametrize("granule", [512, 4096, 65536])
def test_reading_what_zlib_packed(tmp_path: Path, granule: int) -> None:
    granules = [text(granule, seed) for seed in range(40)]
    payloads = [deflate(data) for data in granules]
    whole = b"".join(granules)
    with Disk() as disk:
        disk.layer(
            host(tmp_path, "top", b"\xaa" * 7 + b"".join(payloads)), size=len(whole), granule=granule, unit=granule
        )
        disk.install(0, packed(payloads, 7, granule))
        assert disk.read(0, len(whole)) == whole
        # Parts of more granules than are kept unpacked, twice.
        for index in [*range(39), *range(39)]:
            start = index * granule + 13
            assert disk.read(start, granule) == whole[start : start + granule]
        assert disk.read(5 * granule + 1, 3) == whole[5 * granule + 1 : 5 * granule + 4]


def test_units_are_kept_unpacked_up_to_a_bound(tmp_path: Path) -> None:
    """Half of the cache's bytes and what the map leaves of the cache; those go that were wanted longest ago.

    The payloads are spoiled once they are read.
    """
    granules = [text(GRANULE, seed) for seed in range(24)]
    payloads = [deflate(data) for data in granules]
    file = host(tmp_path, "top", b"".join(payloads))
    with Disk(cache_bytes=16 * GRANULE) as disk:
        disk.layer(file, size=len(granules) * GRANULE)
        disk.install(0, packed(payloads, 0, GRANULE))
        for index in (*range(23), 0, 23):
            assert disk.read(index * GRANULE + 1, 5) == granules[index][1:6]
        file.write_bytes(b"\xff" * sum(map(len, payloads)))
        for index in (0, *range(2, 24)):
            assert disk.read(index * GRANULE + 7, 5) == granules[index][7:12]
        with pytest.raises(ImageError, match="unpack"):
            disk.read(GRANULE + 7, 5)


@pytest.mark.parametrize("more", [20, 100, 200])
def test_what_is_kept_unpacked_makes_room_for_the_map(tmp_path: Path, more: int) -> None:
    granules = [text(GRANULE, seed) for seed in range(20)]
    payloads = [deflate(data) for data in granules]
    file = host(tmp_path, "top", b"".join(payloads))
    first = len(granules) * GRANULE
    with Disk(cache_bytes=16 * GRANULE) as disk:
        disk.layer(file, size=first + more * UNIT)
        disk.install(0, packed(payloads, 0, GRANULE))
        for index in range(len(granules)):
            disk.read(index * GRANULE + 1, 5)
        # Runs that do not join, so that a unit of the map is as large as it can be.
        runs = ((GRANULE, DATA if number % 2 else ZERO, 0) for number in range(more * UNIT // GRANULE))
        disk.install(0, [extent._replace(offset=first + extent.offset) for extent in extents(*runs)])
        kept = (24 * GRANULE - disk.statistics().cache_bytes) // GRANULE
        assert kept < 24
        file.write_bytes(b"\xff" * sum(map(len, payloads)))
        for index in range(max(0, len(granules) - kept), len(granules)):
            assert disk.read(index * GRANULE + 7, 5) == granules[index][7:12]
        if kept < len(granules):
            with pytest.raises(ImageError, match="unpack"):
                disk.read((len(granules) - kept - 1) * GRANULE + 7, 5)


def test_slack_after_the_stream_is_no_harm(tmp_path: Path) -> None:
    payload = deflate(text(GRANULE, 1))
    content = payload + b"\xff" * 300
    with Disk() as disk:
        disk.layer(host(tmp_path, "top", content), size=GRANULE)
        # The payload is counted in sectors and reaches past the end of the file.
        disk.install(0, [Extent(0, GRANULE, COMPRESSED, host_length=2 * GRANULE)])
        assert disk.read(0, GRANULE) == text(GRANULE, 1)


def unfinished(data: bytes) -> bytes:
    """A stream that holds all of the data and has no last block."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush(zlib.Z_SYNC_FLUSH)


@pytest.mark.parametrize("payload", [deflate(pattern(GRANULE) + b"more"), unfinished(pattern(GRANULE))])
def test_a_deflate_stream_needs_no_end_once_the_unit_is_there(tmp_path: Path, payload: bytes) -> None:
    """As QEMU reads qcow2: what a stream gives beyond the cluster is nobody's."""
    with Disk() as disk:
        disk.layer(host(tmp_path, "top", payload), size=GRANULE)
        disk.install(0, packed([payload], 0, GRANULE))
        assert disk.read(0, GRANULE) == pattern(GRANULE)
        assert disk.read(100, 7) == pattern(GRANULE)[100:107]


@pytest.mark.parametrize(
    "payload",
    [
        b"\xff" * 100,
        deflate(pattern(GRANULE - 1)),
        deflate(pattern(GRANULE))[:-5],
        b"",
    ],
)
def test_damaged_payloads_are_corrupt_at_their_place(tmp_path: Path, payload: bytes) -> None:
    path = host(tmp_path, "top", b"\0" * 1000 + payload)
    with Disk() as disk:
        disk.layer(path, size=UNIT)
        run = Extent(0, GRANULE, COMPRESSED, host_offset=1000, host_length=max(len(payload), 1))
        disk.install(0, filled([run], UNIT))
        for offset, length in ((0, GRANULE), (100, 1)):
            with pytest.raises(ImageError) as caught:
                disk.read(offset, length)
            assert (caught.value.kind, caught.value.path, caught.value.offset, caught.value.op) == (
                ErrorKind.CORRUPT,
                str(path),
                1000,
                "unpack",
            )
        assert disk.read(GRANULE, GRANULE) == bytes(GRANULE)


def test_a_reused_payload_place_shows_its_new_contents_after_quiesce(tmp_path: Path) -> None:
    old, new = zlib_pair()
    path = host(tmp_path, "top", old)
    with Disk() as disk:
        disk.layer(path, size=GRANULE, writable=True)
        disk.install(0, packed([old], 0, GRANULE))
        assert disk.read(1, 100) == pattern(GRANULE, 1)[1:101]
        disk.quiesce()
        disk.write_host(0, 0, new)
        assert disk.read(1, 100) == pattern(GRANULE, 2)[1:101]


def zlib_pair() -> tuple[bytes, bytes]:
    """Two payloads of one length for different granules."""
    payloads = [deflate(pattern(GRANULE, seed)) for seed in (1, 2)]
    longest = max(map(len, payloads))
    return payloads[0].ljust(longest, b"\0"), payloads[1].ljust(longest, b"\0")


@pytest.mark.parametrize("granule", [512, 4096, 65536])
def test_what_is_packed_unpacks_with_a_small_window(granule: int) -> None:
    granules = [text(granule, 1), os.urandom(granule), bytes(granule), text(granule, 2)]
    payloads = compress(Codec.RAW_DEFLATE, b"".join(granules), granule)
    assert payloads[1] is None
    for data, payload in zip(granules, payloads, strict=True):
        if payload is not None:
            assert 0 < len(payload) < granule
            assert unpacked(payload, 100) == data
    assert [payload is None for payload in payloads] == [False, True, False, False]


def test_bytes_of_equal_frequency_are_packed_where_strings_repeat() -> None:
    """A granule of which each byte is as frequent as any other is not given up unlooked at."""
    block = random.Random(7).randbytes(2048)
    granules = [block * 32, bytes(range(256)) * 256, random.Random(8).randbytes(65536)]
    payloads = compress(Codec.RAW_DEFLATE, b"".join(granules), 65536)
    assert [payload is None for payload in payloads] == [False, False, True]
    for data, payload in zip(granules[:2], payloads[:2], strict=True):
        assert payload is not None
        assert len(payload) < 4000
        assert unpacked(payload, 100) == data


def test_an_unknown_codec_is_refused() -> None:
    with pytest.raises(ImageError):
        compress(Codec.NONE, bytes(GRANULE), GRANULE)


# The ciphertexts come from `openssl enc -aes-128-cbc -K KEY -iv IV -nopad`, sector by sector.

SECTORS_0_TO_31 = "6a68e542dbb65a541faec2790b05e3cf5c1d3f67d8b73d1c4c6368d7c14529fb"
SECTOR_0X1234567890 = "11d50c07dc2df50ade52cd087c0b880a5d3a1bcdb1009d0fd57731555d244a37"


def test_ciphertext_is_that_of_openssl(tmp_path: Path) -> None:
    plain = pattern(UNIT, 9)
    path = host(tmp_path, "top", b"\0" * (UNIT + 100))
    with Disk() as disk:
        disk.layer(path, size=UNIT, cipher=AES, writable=True)
        disk.install(0, extents((UNIT, DATA, 100)))
        disk.put(plain, 0)
        assert hashlib.sha256(path.read_bytes()[100:]).hexdigest() == SECTORS_0_TO_31
        assert disk.read(0, UNIT) == plain
        assert disk.read(511, 514) == plain[511:1025]
        assert disk.read(1000, 20) == plain[1000:1020]


def test_the_first_block_is_the_published_vector(tmp_path: Path) -> None:
    # NIST SP 800-38A, F.1.1: with the IV of sector 0 CBC is ECB for one block.
    block = bytes.fromhex("6bc1bee22e409f96e93d7e117393172a")
    path = host(tmp_path, "raw", bytes(GRANULE))
    with Disk() as disk:
        disk.layer(path, size=GRANULE, identity=True, cipher=AES, writable=True)
        disk.put(block.ljust(512, b"\0"), 0)
    assert path.read_bytes()[:16].hex() == "3ad77bb40d7a3660a89ecaf32466ef97"


def test_the_sector_number_has_64_bits(tmp_path: Path) -> None:
    path = host(tmp_path, "top", b"")
    size = (0x1234567890 + 8) * 512
    with Disk() as disk:
        disk.layer(path, size=size, cipher=AES, writable=True)
        guest = 0x1234567890 * 512
        base = guest - guest % UNIT
        disk.install(0, [Extent(base, size - base, DATA, in_place=True)])
        disk.put(pattern(512, 9), guest)
        at = guest - base
        assert hashlib.sha256(path.read_bytes()[at : at + 512]).hexdigest() == SECTOR_0X1234567890


@pytest.mark.parametrize("direct", [False, True])
def test_parts_of_sectors_keep_their_neighbours(tmp_path: Path, direct: bool) -> None:  # noqa: FBT001
    size = 600 << 10
    path = host(tmp_path, "top", b"")
    model = bytearray(pattern(size, 4))
    with Disk() as disk:
        disk.layer(path, size=size, unit=1 << 20, cipher=AES, writable=True, direct=direct)
        disk.install(0, extents((size, DATA, 512)))
        disk.put(bytes(model), 0)
        for offset, length in ((0, 1), (511, 2), (5, 500), (1000, 5000), (100, 300 << 10), (size - 3, 3), (512, 512)):
            new = pattern(length, offset % 200 + 5)
            disk.put(new, offset)
            model[offset : offset + length] = new
            assert disk.read(0, size) == model


def test_a_size_that_is_no_multiple_of_the_sector(tmp_path: Path) -> None:
    size = GRANULE + 100
    path = host(tmp_path, "top", b"")
    with Disk() as disk:
        disk.layer(path, size=size, cipher=AES, writable=True)
        disk.install(0, [Extent(0, size, UNALLOCATED)])
        data = pattern(size)
        assert disk.write_reserved(data, 0, [place(0, 2 * GRANULE, 0)]).status is Status.DONE
        disk.install(0, [Extent(0, 2 * GRANULE, DATA, in_place=True)])
        assert disk.read(0, size) == data
        disk.put(b"end", size - 3)
        assert disk.read(0, size) == data[:-3] + b"end"
    assert path.stat().st_size == 2 * GRANULE


def test_compressed_granules_are_not_encrypted(tmp_path: Path) -> None:
    payload = deflate(text(GRANULE, 1))
    with Disk() as disk:
        disk.layer(host(tmp_path, "top", payload), size=GRANULE, cipher=AES)
        disk.install(0, packed([payload], 0, GRANULE))
        assert disk.read(0, GRANULE) == text(GRANULE, 1)


def test_a_key_of_another_length_is_refused() -> None:
    with Disk() as disk, pytest.raises(ValueError, match="16 bytes"):
        disk.add_layer(Geometry(512, 512, 512, identity=Identity(), cipher=AES), key=b"short", files=[])


@pytest.mark.parametrize("codec", [Codec.RAW_DEFLATE, Codec.ZLIB])
def test_the_last_unit_may_hold_only_what_the_disk_has_of_it(tmp_path: Path, codec: Codec) -> None:
    data = text(GRANULE, 3)[:1000]
    payload = deflate(data) if codec is Codec.RAW_DEFLATE else zlib.compress(data)
    for size, good in ((GRANULE + 1000, True), (GRANULE + 999, True), (GRANULE + 1001, False), (2 * GRANULE, False)):
        with Disk() as disk:
            disk.layer(host(tmp_path, "top", payload), size=size, codec=codec)
            run = Extent(GRANULE, GRANULE, COMPRESSED, host_length=len(payload))
            disk.install(0, [Extent(0, GRANULE, ZERO), run])
            if good:
                assert disk.read(GRANULE, size - GRANULE) == data[: size - GRANULE]
                assert disk.read(GRANULE + 10, 20) == data[10:30]
            else:
                with pytest.raises(ImageError, match="unpack"):
                    disk.read(GRANULE, size - GRANULE)


def add_read_only(disk: Disk, path: Path, geometry: Geometry) -> None:
    disk.descriptors.append(os.open(path, os.O_RDONLY))
    disk.add_layer(geometry, files=[HostDescriptor(disk.descriptors[-1], str(path))])


def own_units(tmp_path: Path, units: list[bytes], most: int) -> tuple[Path, list[Extent]]:
    """Payloads that unpack to lengths of their own, one after the other on the disk and in a file."""
    content, runs, at = b"\xaa" * 5, list[Extent](), 0
    for unit in units:
        payload = zlib.compress(unit)
        runs.append(Extent(at, len(unit), COMPRESSED, host_offset=len(content), host_length=len(payload)))
        content += payload
        at += len(unit)
    assert most >= max(map(len, units))
    return host(tmp_path, "own", content), runs


def test_units_of_their_own_lengths_that_begin_anywhere(tmp_path: Path) -> None:
    units = [text(512 * count, count) for count in (1, 7, 40, 3, 100, 2, 1)]
    whole = b"".join(units)
    path, runs = own_units(tmp_path, units, 51200)
    packing = Packing(Codec.ZLIB, unit=51200, own_units=True)
    # Map units cut payloads; an overlay above has others.
    for map_unit in (8192, 20480):
        with Disk() as disk:
            overlay = host(tmp_path, "overlay")
            disk.layer(overlay, size=len(whole), writable=True)
            add_read_only(disk, path, Geometry(len(whole), 512, map_unit, packing=packing))
            disk.install(0, filled([], -(-len(whole) // UNIT) * UNIT))
            disk.install(1, runs)
            for offset in (*range(0, len(whole), 700), 0):
                length = min(3000, len(whole) - offset)
                assert disk.read(offset, length) == whole[offset : offset + length]
            assert disk.read(0, len(whole)) == whole


def test_a_unit_that_is_shorter_than_the_map_says_is_corrupt(tmp_path: Path) -> None:
    path, runs = own_units(tmp_path, [text(1024, 1)], 4096)
    with Disk() as disk:
        add_read_only(disk, path, Geometry(2048, 512, 8192, packing=Packing(Codec.ZLIB, unit=4096, own_units=True)))
        disk.install(0, [runs[0]._replace(length=2048)])
        for _ in range(2):
            assert disk.read(0, 1024) == text(1024, 1)
            with pytest.raises(ImageError, match="unpack"):
                disk.read(1024, 512)
