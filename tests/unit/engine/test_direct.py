"""O_DIRECT: any offset, length and buffer, and the exact length of the file."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tapfs.extent import Extent, Kind
from tapfs.kernel.engine import Status
from tests.unit.engine.engine_disks import GRANULE, UNIT, Disk, extents, host, pattern, place


@pytest.mark.parametrize("size", [1 << 20, (1 << 20) - 512, (1 << 20) - 1234, 100])
def test_odd_reads_and_writes_of_a_raw_disk(tmp_path: Path, size: int) -> None:
    choose = random.Random(size)
    model = bytearray(pattern(size))
    path = host(tmp_path, "raw", bytes(model))
    with Disk() as disk:
        disk.layer(path, size=size, identity=True, writable=True, direct=True)
        for turn in range(120):
            offset = choose.choice([0, choose.randrange(size), size - 1, choose.randrange(size) & ~4095])
            length = min(size - offset, choose.choice([1, 511, 4096, 5000, 70000, 300_000, size]))
            if turn % 2:
                new = pattern(length, choose.randrange(200))
                disk.put(new, offset)
                model[offset : offset + length] = new
            assert disk.read(offset, length) == model[offset : offset + length]
        disk.sync()
        assert disk.read(0, size) == model
    assert path.read_bytes() == model


def test_a_file_grows_by_the_bytes_that_are_written(tmp_path: Path) -> None:
    path = host(tmp_path, "top")
    with Disk() as disk:
        disk.layer(path, size=UNIT, granule=512, writable=True, direct=True)
        disk.install(0, extents((UNIT, Kind.DATA, 0)))
        length = 0
        model = bytearray()
        for part in (512, 512, 3584, 1, 4095, 4097, 10, 3000):
            data = pattern(part, part % 250)
            disk.put(data, length)
            model += data
            length += part
            assert path.stat().st_size == length
        assert disk.read(0, length) == model
        disk.put(b"far", UNIT - 100)
        assert path.stat().st_size == UNIT - 97
        assert disk.read(0, UNIT) == bytes(model.ljust(UNIT - 100, b"\0") + b"far").ljust(UNIT, b"\0")


def test_small_clusters_do_not_disturb_their_block(tmp_path: Path) -> None:
    path = host(tmp_path, "top", b"\xee" * GRANULE)
    with Disk() as disk:
        disk.layer(path, size=GRANULE, granule=512, unit=GRANULE, writable=True, direct=True)
        disk.install(0, [Extent(0, GRANULE, Kind.ZERO)])
        disk.write_reserved(b"x", 1, [place(0, 512, 1024)])
        disk.zero_placements([place(512, 512, 2048)], discard=False)
    content = path.read_bytes()
    assert content[:1024] == b"\xee" * 1024
    assert content[1024:1536] == b"\0x".ljust(512, b"\0")
    assert content[1536:2048] == b"\xee" * 512
    assert content[2048:2560] == bytes(512)
    assert content[2560:] == b"\xee" * (GRANULE - 2560)


def test_nowait_never_waits_for_a_direct_file(tmp_path: Path) -> None:
    with Disk() as disk:
        disk.layer(host(tmp_path, "raw", pattern(UNIT)), size=UNIT, identity=True, direct=True)
        outcome = disk.read_into(bytearray(UNIT), 0, nowait=True)
        assert (outcome.status, outcome.done) == (Status.AGAIN, 0)
