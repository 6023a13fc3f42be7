"""The places that clusters of zeros keep in the file, for `tapfs map --json`: an entry says both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tapfs.driver import ZeroPlace
from tapfs.extent import Kind
from tapfs.formats.qcow2.entries import OFFSET, Run

if TYPE_CHECKING:
    from array import array

    from tapfs.formats.qcow2.reader import Qcow2Reader


def zero_places(image: Qcow2Reader, offset: int, length: int) -> Iterator[ZeroPlace]:
    """What of the range is zeros, or nothing, and where it has a place; see :class:`tapfs.driver.ZeroPlacing`."""
    header, end = image.header, offset + length
    while offset < end:
        unit, inside = divmod(offset, header.unit)
        stop = min(end, offset - inside + header.unit)
        words = image.slices.load(unit)
        if words is None:
            yield ZeroPlace(offset, stop - offset)
        else:
            last = -(-(stop - offset + inside) // header.cluster_size)
            for run in image.decoder.runs(words, inside >> header.cluster_bits, last):
                if isinstance(run, Run):
                    yield from _within(_placed(image, unit, words, run), offset, stop)
        offset = stop


def _placed(image: Qcow2Reader, unit: int, words: array[int], run: Run) -> ZeroPlace:
    header = image.header
    at = unit * header.unit + run.start
    word = words[run.first * header.l2_entry_bytes // 8]
    # Of a cluster with subclusters the first word says whether it has a place, which may be 0 in a data file.
    has_place = image.decoder.kind(word) is Kind.DATA if header.extended_l2 else word & OFFSET
    if not has_place or run.kind is Kind.COMPRESSED:
        return ZeroPlace(at, run.length)
    return ZeroPlace(
        at, run.length, image.data_number, (word & OFFSET) + run.start - (run.first << header.cluster_bits)
    )


def _within(place: ZeroPlace, start: int, stop: int) -> Iterator[ZeroPlace]:
    low, high = max(place.offset, start), min(place.end, stop)
    if low < high:
        host = None if place.host_offset is None else place.host_offset + low - place.offset
        yield ZeroPlace(low, high - low, place.file, host)
