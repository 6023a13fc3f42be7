"""Segments that a copy has to write, of ranges that were read: pointers into the buffer that holds them."""

from __future__ import annotations

from tapfs.extent import Range
from tapfs.kernel._engine import ffi, lib
from tapfs.kernel.engine import Buffer
from tapfs.kernel.ranges import Ranges
from tapfs.kernel.writes import Segments


def most_segments(ranges: Ranges, granule: int) -> int:
    """So many segments are found in the ranges at most."""
    return ranges.packed // (2 * granule) + 2 * ranges.count


def find_segments(
    ranges: Ranges, content: Buffer, granule: int, below: Buffer | None = None
) -> tuple[Segments, list[Range]]:
    """The granules with data, and those of zeros, that are to be written; `content` holds the ranges packed.

    Without `below` everything but zeros is. `below` holds what the target reads as without the write: then what is
    equal to it is left out, and zeros in the place of other bytes are to be written, too. The segments point into
    `content`.
    """
    most = most_segments(ranges, granule)
    segments = ffi.new("tapfs_segment[]", most)
    zeros = ffi.NULL if below is None else ffi.new("tapfs_range[]", most)
    zero_count = ffi.new("size_t *")
    with ffi.from_buffer(content) as data, ffi.from_buffer(b"" if below is None else below) as old:
        if len(data) < ranges.packed or (below is not None and len(old) < ranges.packed):
            raise ValueError(f"a buffer is too small for {ranges.packed} bytes")
        count = lib.tapfs_find_segments(
            ranges.array,
            ranges.count,
            data,
            ffi.NULL if below is None else old,
            granule,
            segments,
            zeros,
            zero_count,
        )
    found = [Range(zeros[number].offset, zeros[number].length) for number in range(zero_count[0])]
    return Segments.of_array(segments, count), found
