"""The bitmaps that follow the disk of an open qcow2 image: their bits in memory, and how they are stored at the end.

An enabled bitmap must mark every piece that is written. Writes in place never meet the driver. So a cluster with a
piece that is not marked yet is not said to be in place: the first write to it is reserved, gets the same place, and
marks it. From then on it is written in place like any other. A bitmap marks whole clusters so, more than it need.

While the image is written its bitmaps say that they are in use. A crash leaves them so, which is inconsistent.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence

from tapfs.driver import HostFile
from tapfs.errors import ImageError
from tapfs.extent import Extent, Range
from tapfs.formats.changed_table import encode
from tapfs.formats.qcow2.bitmap_bits import ALL_ONES, bit_runs, mark_bits, usable_entries
from tapfs.formats.qcow2.bitmaps import IN_USE, Bitmap, read_bitmaps
from tapfs.formats.qcow2.entries import BYTE_ORDER, OFFSET, TYPECODE
from tapfs.formats.qcow2.extensions import Extension
from tapfs.formats.qcow2.header import BITMAPS, WORD, Header
from tapfs.formats.rounding import round_down, round_up
from tapfs.plan import Step, Write
from tapfs.records import NamedTuple

#: Bits of larger bitmaps are not held: such a bitmap is marked as inconsistent by the first write.
_MOST_BYTES = 128 << 20

#: Takes clusters for a content and raises their counts: the offset, and the step that writes it.
Take = Callable[[bytes], tuple[int, Step]]
#: Lowers the counts of a range of the file that nothing will refer to.
Release = Callable[[int, int], None]


class StoreSteps(NamedTuple):
    """What stores bitmaps, each after the one before: new bits and tables, what leads to them, the end of their use."""

    content: list[Step]
    places: list[Step]
    flags: list[Step]


class _Followed:
    """The bits of one bitmap: one for each of `pieces`, and zeros behind them."""

    def __init__(self, granularity: int, pieces: int, bits: bytearray) -> None:
        self.granularity = granularity
        self.bits = bits
        self._pieces = pieces
        #: Whether anything was marked since the image was opened.
        self.changed = False

    def mark(self, offset: int, length: int) -> None:
        """Mark the pieces that a range of the disk touches."""
        stop = min(-(-(offset + length) // self.granularity), self._pieces)
        first = offset // self.granularity
        if first < stop:
            mark_bits(self.bits, first, stop)
            self.changed = True

    def ranges(self, start: int, end: int) -> Iterator[Range]:
        """What is marked of ``[start, end)`` at this moment."""
        low = start // self.granularity // 8
        high = -(-end // self.granularity // 8) + 1
        first = last = start
        for bit, stop in bit_runs(bytes(self.bits[low:high]), low * 8):
            at, after = max(start, bit * self.granularity), min(end, stop * self.granularity)
            if at > last or first == last:
                if first < last:
                    yield Range(first, last - first)
                first = at
            last = max(first, after)
        if first < last:
            yield Range(first, last - first)

    def marked(self, start: int, end: int, granule: int) -> Iterator[tuple[int, int]]:
        """The runs of whole granules in ``[start, end)`` whose pieces are all marked."""
        low = start // self.granularity // 8
        high = -(-end // self.granularity // 8) + 1
        first = last = 0
        for bit, stop in bit_runs(bytes(self.bits[low:high]), low * 8):
            at, after = max(start, bit * self.granularity), min(end, stop * self.granularity)
            if at == last:
                last = after
                continue
            yield from _whole(first, last, start, end, granule)
            first, last = at, after
        yield from _whole(first, last, start, end, granule)


class FollowedBitmaps:
    """The enabled and consistent bitmaps of an image that is open for writing, by their names."""

    def __init__(self, file: HostFile, header: Header, extensions: Sequence[Extension]) -> None:
        self._followed: dict[str, _Followed] = {}
        self._granule = header.granule
        self._cluster_size = header.cluster_size
        if not header.autoclear & BITMAPS:
            return
        for each in _readable(file, extensions):
            try:
                entries = usable_entries(file, header, each)
            except ImageError:  # the first write marks it as inconsistent
                continue
            if len(entries) * header.cluster_size <= _MOST_BYTES:
                pieces = -(-header.size // each.granularity)
                bits = _bits(file, header.cluster_size, entries)
                self._followed[each.name] = _Followed(each.granularity, pieces, bits)

    def __bool__(self) -> bool:
        return bool(self._followed)

    def __contains__(self, name: str) -> bool:
        return name in self._followed

    def ranges(self, name: str, offset: int, length: int) -> Iterator[Range]:
        """What a bitmap marks of a range at this moment."""
        return self._followed[name].ranges(offset, offset + length)

    def mark(self, offset: int, length: int) -> None:
        """Note a change of the disk."""
        for each in self._followed.values():
            each.mark(offset, length)

    def apart(self, extents: Sequence[Extent]) -> list[Extent]:
        """The extents with nothing in place whose change would not be noted."""
        found: list[Extent] = []
        for extent in extents:
            if not extent.in_place:
                found.append(extent)
                continue
            at = extent.offset
            for start, stop in self._marked(extent.offset, extent.end):
                found += [_piece(extent, at, start, in_place=False), _piece(extent, start, stop, in_place=True)]
                at = stop
            found.append(_piece(extent, at, extent.end, in_place=False))
        return [each for each in found if each.length]

    def _marked(self, start: int, end: int) -> list[tuple[int, int]]:
        """The runs that every bitmap marks."""
        runs = [(start, end)]
        for each in self._followed.values():
            runs = [run for low, high in runs for run in each.marked(low, high, self._granule)]
        return runs

    def store(self, listed: Sequence[Bitmap], take: Take, release: Release, read: HostFile) -> StoreSteps:
        """Have the bitmaps of the directory, which are in use, say what they have noted."""
        steps = StoreSteps([], [], [])
        for each in listed:
            followed = self._followed.get(each.name)
            if followed is None or not each.enabled or each.consistent:
                continue
            if followed.changed:
                self._store_bits(each, followed, steps, take, release, read)
            steps.flags.append(each.flagged(each.flags & ~IN_USE))
        return steps

    def _store_bits(
        self, bitmap: Bitmap, followed: _Followed, steps: StoreSteps, take: Take, release: Release, read: HostFile
    ) -> None:
        size = self._cluster_size
        words = array(TYPECODE, bytes(WORD * bitmap.table_entries))
        for index in range(len(words)):
            content = bytes(followed.bits[index * size : (index + 1) * size])
            if content.count(0xFF) == size:
                words[index] = ALL_ONES
            elif content.count(0) != len(content):
                words[index], step = take(content)
                steps.content.append(step)
        place, step = take(encode(words, BYTE_ORDER))
        steps.content.append(step)
        steps.places.append(Write(0, bitmap.offset, place.to_bytes(WORD, "big")))
        table = read.read(bitmap.table_offset, WORD * bitmap.table_entries)
        release(bitmap.table_offset, len(table))
        for at in range(0, len(table), WORD):
            old = int.from_bytes(table[at : at + WORD], "big") & OFFSET
            if old:
                release(old, 1)


def _readable(file: HostFile, extensions: Sequence[Extension]) -> list[Bitmap]:
    """The bitmaps that a write has to note; none in a damaged directory, which the first write would meet."""
    try:
        return [each for each in read_bitmaps(file, extensions) if each.must_be_marked]
    except ImageError:
        return []


def _bits(file: HostFile, cluster_size: int, entries: Sequence[int]) -> bytearray:
    bits = bytearray(len(entries) * cluster_size)
    for index, entry in enumerate(entries):
        at = index * cluster_size
        if entry & ALL_ONES:
            bits[at : at + cluster_size] = b"\xff" * cluster_size
        elif entry:
            content = file.read(entry & OFFSET, cluster_size)
            bits[at : at + len(content)] = content
    return bits


def _whole(low: int, high: int, start: int, end: int, granule: int) -> Iterator[tuple[int, int]]:
    """The whole granules of ``[low, high)``; `start` and `end` are borders of granules, or the end of the disk."""
    first = low if low == start else round_up(low, granule)
    stop = high if high == end else round_down(high, granule)
    if first < stop:
        yield first, stop


def _piece(extent: Extent, start: int, stop: int, *, in_place: bool) -> Extent:
    host_offset = extent.host_offset + start - extent.offset
    return extent._replace(offset=start, length=stop - start, host_offset=host_offset, in_place=in_place)
