"""References counted, and counters changed, by the engine: drivers do both by it once this module is told to."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from tapfs.kernel._engine import ffi, lib
from tapfs.references import CountedBlock, CountedWindow, EntryLayout, OwnedClusters, TableKind, use_counter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tapfs.kernel._engine import CData

#: Bytes of a sector, which has one mark in an array of sectors.
SECTOR = 512
_NO_PLACE = (1 << 64) - 1


class EngineCounter:
    """A :class:`tapfs.references.EntryCounter`."""

    #: So many payloads are sorted at once: 16 MiB of them.
    MOST_PAYLOADS = 1 << 20

    def __init__(self, layout: EntryLayout) -> None:
        self._layout = ffi.new("tapfs_references *")
        for name in layout.__match_args__:
            if name != "reserved":
                setattr(self._layout, name, getattr(layout, name))
        for number, (start, stop) in enumerate(layout.reserved):
            self._layout.reserved[2 * number], self._layout.reserved[2 * number + 1] = start, stop
        self._words = 2 if layout.bitmaps else 1
        self._counted = ffi.new("tapfs_counted *")
        self._owners = ffi.new("tapfs_owners *")

    def count(self, entries: bytes, first: int, stop: int, times: int, window: CountedWindow) -> int:
        """See :meth:`tapfs.references.EntryCounter.count`."""
        counted = self._counted
        self._require(entries, stop)
        counted.base, counted.clusters, counted.window_bits = window.base, window.clusters, window.window_bits
        counted.window_count = len(window.noted)
        counted.data_bytes, counted.shared = window.data_bytes, window.shared
        counted.skip_owned = window.skips_owned
        with ffi.from_buffer(entries) as source, ffi.from_buffer(window.noted) as noted:
            counted.windows = ffi.cast("uint8_t *", noted)
            at = self._count_in(source, first, stop, times, window)
            if counted.full:
                window.widen()
                at = self._count_in(source, at, stop, times, window)
        window.data_bytes, window.shared = counted.data_bytes, counted.shared
        return at

    def mark_owners(self, entries: bytes, first: int, stop: int, kind: TableKind, owners: OwnedClusters) -> int:
        """See :meth:`tapfs.references.EntryCounter.mark_owners`."""
        self._require(entries, stop)
        marked = self._owners
        marked.base, marked.clusters, marked.window_bits = owners.base, owners.clusters, owners.window_bits
        marked.window_count, marked.table, marked.shared = len(owners.noted), kind, owners.shared
        with (
            ffi.from_buffer(entries) as source,
            ffi.from_buffer("uint8_t[]", owners.alone) as marked.alone,
            ffi.from_buffer("uint8_t[]", owners.others_marks) as marked.others,
            ffi.from_buffer("uint8_t[]", owners.noted) as marked.windows,
        ):
            at = int(lib.tapfs_mark_owners(self._layout, source, first, stop, marked))
        owners.shared, owners.doubled = marked.shared, marked.doubled != 0
        return at

    def overlapping_payload(self, tables: Callable[[], Iterable[tuple[bytes, int]]]) -> int | None:
        """See :meth:`tapfs.references.EntryCounter.overlapping_payload`. Memory is bounded, whatever there is."""
        found, count, end = ffi.new("tapfs_payload[]", self.MOST_PAYLOADS), ffi.new("size_t *"), ffi.new("uint64_t *")
        low = 0
        high = size = self._layout.file_size
        while low < size:
            end_before = end[0]
            whole = self._gather(tables(), low, high, found, count)
            place = int(lib.tapfs_overlapping_payload(found, count[0], end))
            if place != _NO_PLACE:
                return place
            if whole:
                low, high = high, min(size, high + high - low)
            else:  # two payloads at one place overlap, so some part of the window has room enough
                high, end[0] = low + (high - low) // 2, end_before
        return None

    def _gather(self, tables: Iterable[tuple[bytes, int]], low: int, high: int, found: CData, count: CData) -> bool:
        """The payloads that begin in ``[low, high)``, from the first of `found` on; False if there is no room."""
        count[0] = 0
        for entries, stop in tables:
            self._require(entries, stop)
            with ffi.from_buffer(entries) as source:
                at = lib.tapfs_gather_payloads(
                    self._layout, source, 0, stop, low, high, found, self.MOST_PAYLOADS, count
                )
            if at < stop:
                return False
        return True

    def find_ownership(self, entries: bytes, first: int, stop: int, base: int, alone: bytearray) -> int:
        """See :meth:`tapfs.references.EntryCounter.find_ownership`."""
        self._require(entries, stop)
        with ffi.from_buffer(entries) as source, ffi.from_buffer("uint8_t[]", alone) as bits:
            return int(lib.tapfs_find_ownership(self._layout, source, first, stop, base, len(alone), bits))

    def mark_owned(self, entries: bytearray, base: int, alone: bytearray) -> int:
        """See :meth:`tapfs.references.EntryCounter.mark_owned`."""
        stop = len(entries) // (8 * self._words)
        with (
            ffi.from_buffer(entries, require_writable=True) as target,
            ffi.from_buffer("uint8_t[]", alone) as bits,
        ):
            return int(lib.tapfs_mark_owned(self._layout, target, 0, stop, base, len(alone), bits))

    def _require(self, entries: bytes | bytearray, stop: int) -> None:
        if len(entries) < 8 * self._words * stop:
            raise ValueError(f"{len(entries)} bytes hold no {stop} entries")

    def _count_in(self, source: CData, first: int, stop: int, times: int, window: CountedWindow) -> int:
        counted = self._counted
        counted.width = window.width
        with ffi.from_buffer(window.counts) as counts:
            counted.counts = ffi.cast("void *", counts)
            return int(lib.tapfs_count_references(self._layout, source, first, stop, times, counted))


class EngineChanger:
    """A :class:`tapfs.references.CountChanger`."""

    def raise_counts(self, counters: array[int], order: int, block: CountedBlock, sectors: bytearray) -> int:
        """See :meth:`tapfs.references.CountChanger.raise_counts`."""
        _require_counters(counters, order, block, sectors)
        with (
            ffi.from_buffer(counters, require_writable=True) as target,
            ffi.from_buffer(block.counts) as times,
            ffi.from_buffer("uint8_t[]", sectors, require_writable=True) as marks,
        ):
            return int(lib.tapfs_raise_counts(target, order, times, block.width, block.clusters, marks))

    def find_uncounted(self, counters: bytes, order: int, first: int, count: int, marks: bytearray, mark: int) -> int:
        """See :meth:`tapfs.references.CountChanger.find_uncounted`."""
        if len(counters) << 3 < first + count << order or len(marks) << 3 < mark + count:
            raise ValueError(f"no {count} counters, or no {count} marks")
        with ffi.from_buffer(counters) as source, ffi.from_buffer("uint8_t[]", marks) as bits:
            return int(lib.tapfs_find_uncounted(source, order, first, count, bits, mark))

    def lower_counts(
        self, counters: array[int], order: int, block: CountedBlock, sectors: bytearray, freed: bytearray
    ) -> None:
        """See :meth:`tapfs.references.CountChanger.lower_counts`."""
        _require_counters(counters, order, block, sectors)
        if len(freed) < block.clusters:
            raise ValueError("too few marks for what becomes free")
        with (
            ffi.from_buffer(counters, require_writable=True) as target,
            ffi.from_buffer(block.counts) as times,
            ffi.from_buffer("uint8_t[]", sectors, require_writable=True) as marks,
            ffi.from_buffer("uint8_t[]", freed, require_writable=True) as free,
        ):
            lib.tapfs_lower_counts(target, order, times, block.width, block.clusters, marks, free)


def _require_counters(counters: array[int], order: int, block: CountedBlock, sectors: bytearray) -> None:
    length = len(counters) * counters.itemsize
    if length << 3 < block.clusters << order or len(sectors) * SECTOR < length:
        raise ValueError(f"{length} bytes hold no {block.clusters} counters, or have more sectors than marks")


def use_engine() -> None:
    """Have drivers count, and change counts, by the engine."""
    use_counter(EngineCounter, EngineChanger())
