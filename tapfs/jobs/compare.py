"""Compare two disks: find the first byte in which a guest would read a difference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from tapfs.extent import Range
from tapfs.jobs.pipeline import WINDOW_BYTES, BufferPool, in_order
from tapfs.kernel.engine import first_difference, is_zero

if TYPE_CHECKING:
    from tapfs.disk.image import Image


class Difference(NamedTuple):
    """The first byte that differs, or, with `offset` None, sizes that differ and had to be equal."""

    offset: int | None


def compare(
    left: Image, right: Image, *, strict: bool = False, progress: Callable[[int, int], None] | None = None
) -> Difference | None:
    """The first difference between two disks, or None if a guest reads the same from both.

    Where one is longer its excess must read as zeros; with `strict` the sizes must be equal.
    Ranges that both are known to read as zeros are not read. Raises ImageError when either
    cannot be read.
    """
    if strict and left.size != right.size:
        return Difference(None)
    total = max(left.size, right.size)
    buffers = BufferPool(WINDOW_BYTES)

    def examine(window: Range) -> tuple[Range, int | None]:
        return window, _difference_in(left, right, window, buffers)

    windows = split(unequal_candidates(left, right), WINDOW_BYTES)
    for window, found in in_order(windows, examine, workers=2, ahead=4):
        if found is not None:
            return Difference(found)
        if progress is not None:
            progress(window.offset + window.length, total)
    return None


def unequal_candidates(left: Image, right: Image) -> Iterator[Range]:
    """The ranges, as far as the longer disk goes, that are not known to be zeros in both."""
    end = max(left.size, right.size)
    a, b = _zero_marks(left, end), _zero_marks(right, end)
    offset = a_end = b_end = 0
    a_zero = b_zero = True
    start: int | None = None
    while offset < end:
        if a_end <= offset:
            a_end, a_zero = next(a)
        if b_end <= offset:
            b_end, b_zero = next(b)
        if a_zero and b_zero:
            if start is not None:
                yield Range(start, offset - start)
                start = None
        elif start is None:
            start = offset
        offset = min(a_end, b_end)
    if start is not None:
        yield Range(start, end - start)


def split(ranges: Iterator[Range], size: int) -> Iterator[Range]:
    """The same ranges cut at every multiple of `size`."""
    for offset, length in ranges:
        at, end = offset, offset + length
        while at < end:
            stop = min(end, at - at % size + size)
            yield Range(at, stop - at)
            at = stop


def _zero_marks(image: Image, end: int) -> Iterator[tuple[int, bool]]:
    """Where each extent ends and whether it is known to be zeros; zeros after the disk's own end."""
    for extent in image.extents():
        yield extent.offset + extent.length, extent.zero
    if image.size < end:
        yield end, True


def _difference_in(left: Image, right: Image, window: Range, buffers: BufferPool) -> int | None:
    a, b = buffers.take(), buffers.take()
    try:
        with memoryview(a) as a_view, memoryview(b) as b_view:
            a_length = read_within(left, window, a_view)
            b_length = read_within(right, window, b_view)
            common = min(a_length, b_length)
            found = first_difference(a_view[:common], b_view[:common])
            if found is None and a_length != b_length:
                rest = (a_view if a_length > b_length else b_view)[common : max(a_length, b_length)]
                found = None if is_zero(rest) else common + _first_nonzero(rest)
            return None if found is None else window.offset + found
    finally:
        buffers.give_back(a)
        buffers.give_back(b)


def read_within(image: Image, window: Range, buffer: memoryview) -> int:
    """Fill `buffer` from the part of `window` that lies inside the disk; returns its length."""
    length = max(0, min(window.length, image.size - window.offset))
    if length:
        image.read_into(window.offset, buffer[:length])
    return length


def _first_nonzero(buffer: memoryview) -> int:
    return next(index for index, byte in enumerate(buffer) if byte)
