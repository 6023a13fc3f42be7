"""The engine's marks of what was written: complete where nobody writes, taken once, none for what was read."""

from __future__ import annotations

from pathlib import Path

import pytest

import tapfs
from tapfs.extent import Range
from tapfs.kernel.written import WrittenMarks

UNIT = 65536
SIZE = 40 * UNIT + 512


@pytest.mark.parametrize("format_name", ["raw", "qcow2", "vhd"])
def test_what_is_written_is_marked(tmp_path: Path, format_name: str) -> None:
    path = str(tmp_path / "disk")
    tapfs.create(path, format_name, SIZE)
    with tapfs.open(path, format=format_name, writable=True) as disk:
        disk.write(0, b"before")
        marks = WrittenMarks(disk.engine_disk, disk.size, path=path)
        assert (marks.bytes, marks.take()) == (0, [])
        disk.read(0, disk.size)
        disk.write(UNIT - 1, b"two")  # in place, or to new places
        disk.write(UNIT - 1, b"two")
        disk.write(5 * UNIT, b"data")
        disk.write_zeroes(5 * UNIT, UNIT)
        disk.write(SIZE - 512, bytes([1]) * 512)
        taken = marks.take()
        if format_name == "vhd":  # whose places are blocks of 2 MiB
            assert taken == [Range(0, 2 * UNIT), Range(5 * UNIT, UNIT), Range(32 * UNIT, SIZE - 32 * UNIT)]
        else:
            assert taken == [Range(0, 2 * UNIT), Range(5 * UNIT, UNIT), Range(40 * UNIT, 512)]
        assert (marks.bytes, marks.take()) == (0, [])
        disk.write(63 * 512, b"again")
        assert marks.bytes == UNIT
        marks.end()
        disk.write(3 * UNIT, b"unseen")
        assert marks.take() == [Range(0, UNIT)]
        again = WrittenMarks(disk.engine_disk, disk.size, path=path)
        assert again.take() == []
