"""Ranges of data as the engine makes them against the map that the drivers give: images of every kind, and chains."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, pairwise
from pathlib import Path

import pytest

import tapfs
from tapfs import Image
from tapfs.disk.chain_map import map_chain
from tapfs.extent import Range
from tapfs.kernel._engine import ffi
from tapfs.kernel.ranges import Ranges, data_ranges, nothing, union
from tapfs.kernel.segments import find_segments

SIZE = 3 * 1024 * 1024 + 2560
PASSWORD = b"secret"
#: A format for each image of the chain, the lowest first. Parents are shorter than what lies over them.
KINDS = {
    "raw": ["raw"],
    "qcow": ["qcow"],
    "blktap": ["blktap"],
    "packed": ["packed"],
    "aes": ["aes"],
    "overlay": ["raw", "qcow"],
    "three": ["raw", "qcow", "qcow"],
    "over-blktap": ["blktap", "qcow"],
}


def scatter(disk: Image, chance: random.Random) -> None:
    """Pieces of data, zeros and what was discarded, from single bytes to hundreds of kibibytes."""
    for _ in range(chance.randrange(15, 60)):
        length = chance.choice([1, 512, 4096, 4096, 12288, 65536, 65536, 300000, chance.randrange(1, 70000)])
        offset = chance.randrange(disk.size - length)
        if chance.random() < 0.7:
            offset -= offset % 4096
        match chance.randrange(5):
            case 0:
                disk.write_zeroes(offset, length)
            case 1:
                disk.discard(offset, length)
            case _:
                disk.write(offset, chance.randbytes(length))


def make(kind: str, folder: Path, seed: int) -> Callable[..., Image]:
    """A disk of that kind; what opens it."""
    chance = random.Random(f"{kind} {seed}")
    layers = KINDS[kind]
    path, name, below, formats = "", "", None, list[str]()
    password = PASSWORD if kind == "aes" else None
    for number, layer in enumerate(layers):
        below, path = path or None, str(folder / f"{number}.{layer}")
        size = SIZE - 500_224 * (len(layers) - 1 - number)
        name = "raw" if layer in ("raw", "packed") else "qcow"
        options = {"blktap": "on"} if layer == "blktap" else {"cluster_size": chance.choice(["512", "4096", "65536"])}
        tapfs.create(
            path,
            name,
            size,
            backing=below,
            backing_format=formats[0] if formats else None,
            options={} if name == "raw" else options,
            password=password,
        )
        with tapfs.open(path, format=name, writable=True, password=password, backing_formats=formats) as disk:
            scatter(disk, chance)
        if layer == "packed":
            raw, path, name = path, f"{path}.qcow", "qcow"
            tapfs.convert(raw, path, format="raw", target_format=name, compressed=True)
        if name != "raw":
            # Holes of the host inside clusters are no data for the engine, and data for a driver's map.
            Path(path).write_bytes(Path(path).read_bytes())
        formats.insert(0, name)
    return partial(tapfs.open, path, format=name, password=password, backing_formats=formats[1:])


def expected(disk: Image, gap: int, align: int) -> list[Range]:
    """The same from `Driver.map`."""
    found: list[Range] = []
    for run in map_chain(disk.layers, 0, disk.size):
        if not run.data:
            continue
        start, stop = run.offset - run.offset % align, -(-run.end // align) * align
        if found and start - found[-1].end <= gap:
            found[-1] = Range(found[-1].offset, max(stop, found[-1].end) - found[-1].offset)
        else:
            found.append(Range(start, stop - start))
    return found


def pieces(disk: Image, chance: random.Random, **bounds: int) -> Iterator[Ranges]:
    """All of the disk by many calls, each bounded another way."""
    align = bounds["align"]
    offset = 0
    while offset < disk.size:
        found, outcome = data_ranges(
            disk.engine_disk,
            offset,
            disk.size,
            most=chance.choice([1, 2, 7, 1000]),
            most_bytes=chance.choice([align, 3 * align, 1 << 40]),
            lookups=chance.choice([1, 2, 100]),
            **bounds,
        )
        if outcome.needs_map:
            disk.supply_map(outcome)
        assert found.until >= offset
        assert found.until == disk.size or found.until % align == 0
        yield found
        offset = found.until


def joined(lists: Iterator[Ranges], gap: int) -> list[Range]:
    """The ranges of all lists as one list; what a bound has cut is whole again."""
    found: list[Range] = []
    for each in chain.from_iterable(lists):
        if found and each.offset - found[-1].end <= gap:
            found[-1] = Range(found[-1].offset, each.end - found[-1].offset)
        else:
            found.append(each)
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_finds_the_data_that_the_drivers_map(tmp_path: Path, kind: str, seed: int) -> None:
    chance = random.Random(seed)
    with make(kind, tmp_path, seed)() as disk:
        for gap, align in ((0, 1), (4095, 1), (70000, 1), (0, 4096), (0, 65536), (4095, 12288)):
            whole = expected(disk, gap, align)
            assert whole
            lists = list(pieces(disk, chance, gap=gap, align=align))
            for each in lists:
                assert all(before.end + gap < after.offset for before, after in pairwise(each))
            for before, after in pairwise(lists):
                assert all(each.end <= max(before.until, -(-before.until // align) * align) for each in before)
                assert all(each.offset >= before.until for each in after)
            assert joined(iter(lists), gap) == whole


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_ranges_that_are_read_together_read_as_alone(tmp_path: Path, kind: str, *, direct: bool) -> None:
    """Ranges past the end of the disk are zeros, and granules of them are what a copy needs to write."""
    opened = make(kind, tmp_path, 5)
    with opened() as disk:
        content = disk.read(0, disk.size)
        for granule in (512, 4096, 65536):
            found = disk.disk_map.data_ranges(0, disk.size, align=granule, most_bytes=1 << 30)
            buffer = bytearray(os.urandom(found.packed + 3))
            with opened(direct=direct) as fresh:  # it has no maps yet, and asks for them in between
                fresh.read_ranges(found, buffer)
            at = 0
            for offset, length in found:
                assert buffer[at : at + length] == content[offset : offset + length].ljust(length, b"\0")
                assert found.place(at) == offset
                assert found.place(at + length - 1) == offset + length - 1
                at += length
            segments, zeros = find_segments(found, buffer, 4096)
            assert not zeros
            copied = bytearray(disk.size + 65536)
            for number, (offset, length) in enumerate(segments.ranges()):
                copied[offset : offset + length] = ffi.buffer(segments.array[number].data, length)[:]
                for start in range(offset - offset % 4096, offset + length, 4096):
                    assert any(copied[max(start, offset) : min(start + 4096, offset + length)])
            assert copied == content.ljust(len(copied), b"\0")


def listed(*pairs: tuple[int, int], until: int) -> Ranges:
    return Ranges(ffi.new("tapfs_range[]", list(pairs)), len(pairs), until)


def test_what_either_of_two_disks_has() -> None:
    left = listed((0, 10), (20, 10), (50, 10), until=100)
    right = listed((5, 20), (30, 5), (60, 5), (70, 30), (110, 5), until=200)
    both = union(left, right)
    assert list(both) == [Range(0, 35), Range(50, 15), Range(70, 30)]
    assert (both.until, both.packed) == (100, 80)
    assert list(union(right, left)) == list(both)
    assert list(union(left, listed(until=25))) == [Range(0, 10), Range(20, 5)]
    assert list(union(nothing(7), nothing(9))) == []


@pytest.mark.parametrize("seed", range(20))
def test_what_differs_from_what_lies_below(seed: int) -> None:
    """Of two buffers the granules that differ, those of zeros by themselves; granules are those of the disk."""
    chance = random.Random(seed)
    granule, size = chance.choice([64, 512]), 1 << 14
    below = bytearray(size)
    for _ in range(20):
        at = chance.randrange(size)
        below[at : at + 200] = chance.randbytes(min(200, size - at))
    content = bytearray(below)
    for _ in range(20):
        at, length = chance.randrange(size), chance.randrange(1, 300)
        content[at : at + length] = chance.choice([bytes, chance.randbytes])(min(length, size - at))
    places = sorted(chance.sample(range(size), 10))
    ranges = listed(*((start, stop - start) for start, stop in zip(places[::2], places[1::2], strict=True)), until=size)
    segments, zeros = find_segments(
        ranges,
        b"".join(content[offset : offset + length] for offset, length in ranges),
        granule,
        b"".join(below[offset : offset + length] for offset, length in ranges),
    )
    data, cleared = bytearray(size), bytearray(size)
    for offset, length in ranges:
        for start in range(offset - offset % granule, offset + length, granule):
            part = slice(max(start, offset), min(start + granule, offset + length))
            if content[part] != below[part]:
                (data if any(content[part]) else cleared)[part] = b"x" * len(content[part])
    for marks, found in ((data, segments.ranges()), (cleared, zeros)):
        for offset, length in found:
            assert marks[offset : offset + length] == b"x" * length
        assert sum(length for _, length in found) == marks.count(b"x")
