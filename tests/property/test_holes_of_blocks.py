"""Blocks that are holes of the host's file for the most part: what is found as data is all data, and little else.

The images are of formats whose blocks are large. A guest has written small pieces of them, in random order.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

import tapfs
from tapfs import Image
from tapfs.errors import ErrorKind, ImageError
from tapfs.kernel.ranges import data_ranges

MIB = 1 << 20
SIZE = 24 * MIB + 2560
FORMATS = {"vdi": {}, "vhd": {}, "vhdx": {"block_size": "8388608"}, "qcow2": {"cluster_size": "2097152"}}


def written(folder: Path, name: str, chance: random.Random) -> Path:
    """An image whose disk has pieces of 512 bytes to 300 KiB at random places."""
    path = folder / f"disk.{name}"
    tapfs.create(str(path), name, SIZE, options=FORMATS[name])
    with tapfs.open(str(path), format=name, writable=True) as disk:
        for _ in range(40):
            length = chance.choice([512, 4096, 4096, 65536, 300_000])
            offset = chance.randrange(disk.size - length)
            disk.write(offset, chance.randbytes(length))
    return path


def found_data(disk: Image, chance: random.Random, align: int, gap: int) -> tuple[bytearray, int]:
    """What the disk reads as where data is found, zeros elsewhere; and how many bytes were found."""
    seen, total, offset = bytearray(disk.size + align), 0, 0
    while offset < disk.size:
        bounds = {"most": chance.choice([1, 3, 1000]), "lookups": chance.choice([1, 5, 1000])}
        most_bytes = chance.choice([align, 64 * align, 1 << 40])
        found, outcome = data_ranges(
            disk.engine_disk, offset, disk.size, gap=gap, align=align, most_bytes=most_bytes, **bounds
        )
        if outcome.needs_map:
            disk.supply_map(outcome)
        buffer = bytearray(found.packed)
        disk.read_ranges(found, buffer)
        at = 0
        for start, length in found:
            seen[start : start + length] = buffer[at : at + length]
            at += length
        total += found.packed
        offset = found.until
    return seen, total


@pytest.mark.parametrize("name", FORMATS)
def test_all_data_is_found_and_holes_of_the_host_are_left_out(tmp_path: Path, name: str) -> None:
    chance = random.Random(name)
    path = written(tmp_path, name, chance)
    with tapfs.open(str(path), format=name) as disk:
        content = disk.read(0, disk.size)
        on_host = path.stat().st_blocks * 512
        assert on_host < len(content) // 5
        for align, gap in ((1, 0), (1, 4095), (4096, 0), (65536, 0)):
            seen, total = found_data(disk, chance, align, gap)
            assert seen == content.ljust(len(seen), b"\0")
            # Each piece is widened at both ends, and a call that goes on inside a block asks for 64 KiB first.
            assert total <= on_host + 80 * (65536 + align + gap)
            assert total < len(content) // 2


@pytest.mark.parametrize("name", ["vdi", "vhdx"])
def test_what_a_shorter_file_has_lost_is_no_hole(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, name, random.Random(1))
    with tapfs.open(str(path), format=name) as disk:
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(ImageError) as caught:
            found_data(disk, random.Random(1), 1, 0)
    assert caught.value.kind in {ErrorKind.CORRUPT, ErrorKind.IO}
