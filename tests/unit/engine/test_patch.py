"""Changing the cached map of a range without asking for the rest of its unit again."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import tapfs
from tapfs.driver import Codec
from tapfs.errors import ImageError
from tapfs.extent import Extent, Kind
from tapfs.kernel.engine import Status, compress
from tests.unit.engine.engine_disks import GRANULE, UNIT, Disk, host, packed, pattern

UNITS = 3
GRANULES = UNITS * UNIT // GRANULE
SIZE = GRANULES * GRANULE
HOST = 2 * SIZE


def extents_of(model: list[int | None], first: int, stop: int) -> list[Extent]:
    """A granule each: at a host granule, or nowhere."""
    return [
        Extent(i * GRANULE, GRANULE, Kind.UNALLOCATED)
        if place is None
        else Extent(i * GRANULE, GRANULE, Kind.DATA, host_offset=place * GRANULE, in_place=True)
        for i, place in enumerate(model[first:stop], first)
    ]


@pytest.mark.parametrize("seed", range(8))
def test_patched_map_is_the_new_map(tmp_path: Path, seed: int) -> None:
    choice = random.Random(seed)
    content = pattern(HOST, seed + 1)
    model: list[int | None] = [choice.choice([None, choice.randrange(HOST // GRANULE)]) for _ in range(GRANULES)]
    with Disk() as disk:
        disk.layer(host(tmp_path, "file", content), size=SIZE, writable=True)
        disk.install(0, extents_of(model, 0, GRANULES))
        for _ in range(60):
            first = choice.randrange(GRANULES)
            stop = choice.randrange(first + 1, GRANULES + 1)
            start = choice.randrange(HOST // GRANULE - GRANULES)
            for i in range(first, stop):
                model[i] = choice.choice([None, start + i - first, start + i - first])
            disk.patch(0, extents_of(model, first, stop))
            expected = b"".join(
                bytes(GRANULE) if place is None else content[place * GRANULE :][:GRANULE] for place in model
            )
            assert disk.read(0, SIZE) == expected
            at = choice.randrange(SIZE - 1)
            assert disk.read(at, min(5000, SIZE - at)) == expected[at : at + 5000]


@pytest.mark.parametrize("seed", range(8))
def test_scattered_ranges_are_patched_in_one_call(tmp_path: Path, seed: int) -> None:
    """Over several units, of which one is not cached; what lies between the ranges stays."""
    choice = random.Random(seed)
    content = pattern(HOST, seed + 1)
    model: list[int | None] = [choice.choice([None, choice.randrange(HOST // GRANULE)]) for _ in range(GRANULES)]
    with Disk() as disk:
        disk.layer(host(tmp_path, "file", content), size=SIZE, writable=True)
        for _ in range(30):
            uncached = choice.randrange(UNITS) * UNIT
            disk.install(0, extents_of(model, 0, GRANULES))
            disk.forget(0, uncached, UNIT)
            changed = [i for i in range(GRANULES) if choice.random() < 0.4] or [0]
            for i in changed:
                model[i] = choice.choice([None, choice.randrange(HOST // GRANULE)])
            disk.patch(0, [extent for i in changed for extent in extents_of(model, i, i + 1)])
            assert disk.read_into(bytearray(1), uncached).status is Status.MISS
            for i, place in enumerate(model):
                if not uncached <= i * GRANULE < uncached + UNIT:
                    expected = bytes(GRANULE) if place is None else content[place * GRANULE :][:GRANULE]
                    assert disk.read(i * GRANULE, GRANULE) == expected


def test_only_what_is_cached(tmp_path: Path) -> None:
    with Disk() as disk:
        disk.layer(host(tmp_path, "file", pattern(HOST)), size=SIZE, writable=True)
        disk.install(0, [Extent(UNIT, UNIT, Kind.UNALLOCATED)])
        disk.patch(0, [Extent(0, SIZE, Kind.DATA, in_place=True)])
        assert disk.read_into(bytearray(1), 0).status is Status.MISS
        assert disk.read(UNIT, UNIT) == pattern(HOST)[UNIT : 2 * UNIT]
        assert disk.read_into(bytearray(1), 2 * UNIT).status is Status.MISS


def test_beside_compressed_granules(tmp_path: Path) -> None:
    plain = [pattern(64, seed) * (GRANULE // 64) for seed in range(4)]
    payloads = [payload for payload in compress(Codec.RAW_DEFLATE, b"".join(plain), GRANULE) if payload]
    assert len(payloads) == 4
    with Disk() as disk:
        disk.layer(host(tmp_path, "file", pattern(HOST) + b"".join(payloads)), size=UNIT, writable=True)
        disk.install(0, packed(payloads, HOST, GRANULE))
        disk.patch(0, [Extent(GRANULE, GRANULE, Kind.DATA, host_offset=0, in_place=True)])
        assert disk.read(0, UNIT) == plain[0] + pattern(GRANULE) + plain[2] + plain[3]


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        [Extent(512, GRANULE, Kind.ZERO)],
        [Extent(0, 512, Kind.ZERO)],
        [Extent(0, 512, Kind.ZERO), Extent(2 * GRANULE, GRANULE, Kind.ZERO)],
        [Extent(0, GRANULE, Kind.ZERO), Extent(2 * GRANULE - 512, GRANULE + 512, Kind.ZERO)],
        [Extent(2 * GRANULE, GRANULE, Kind.ZERO), Extent(0, GRANULE, Kind.ZERO)],
        [Extent(0, 2 * GRANULE, Kind.ZERO), Extent(GRANULE, 2 * GRANULE, Kind.ZERO)],
        [Extent(0, GRANULE, Kind.DATA, file=1)],
        [Extent(0, GRANULE, Kind.DATA, host_offset=(1 << 63) - 1)],
        [Extent((1 << 64) - GRANULE, GRANULE, Kind.ZERO)],
    ],
)
def test_rules(tmp_path: Path, wrong: list[Extent]) -> None:
    with Disk() as disk:
        disk.layer(host(tmp_path, "file", pattern(HOST)), size=SIZE, writable=True)
        disk.install(0, [Extent(0, UNIT, Kind.DATA)])
        with pytest.raises(ImageError):
            disk.patch(0, wrong)
        assert disk.read(0, UNIT) == pattern(HOST)[:UNIT]


def test_allocating_asks_for_the_map_once(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow"
    tapfs.create(str(path), "qcow", 8 << 20)
    with tapfs.open(path, format="qcow", writable=True) as image:
        image.write(0, b"first")
        misses = image.statistics().cache_misses
        for number in range(100):
            image.write(number * 5000 + 4096, b"%d" % number)
        assert image.read(4096 + 5000 * 99, 2) == b"99"
        assert image.statistics().cache_misses == misses
