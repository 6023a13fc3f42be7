"""The bitmaps of a VHD that differ from the disk, by the place of each, and which sectors of them do."""

from __future__ import annotations

from collections.abc import Iterator

from tapfs.formats.vhd.dynamic_header import SECTOR

#: Bits in a sector of a bitmap.
_BITS = 8 * SECTOR


class _Bitmap:
    __slots__ = ("bits", "in_plan", "pending")

    def __init__(self) -> None:
        self.bits = bytearray()
        self.pending: set[int] = set()
        self.in_plan: set[int] = set()


class ChangedBitmaps:
    """Changed bitmaps, the most significant bit first.

    `pending` sectors changed since the last flush, `in_plan` ones are in the plan that is being executed.
    """

    def __init__(self, bitmap_bytes: int) -> None:
        self._bitmap_bytes = bitmap_bytes
        self._changed: dict[int, _Bitmap] = {}
        #: The places of those with something pending.
        self._pending: set[int] = set()

    def get(self, place: int) -> bytearray | None:
        """The bitmap at `place`, if it differs from the disk; not to be changed."""
        found = self._changed.get(place)
        return None if found is None else found.bits

    def put(self, place: int, bits: bytearray, first: int, stop: int) -> None:
        """The bitmap at `place` as it is from now on; its bits ``[first, stop)`` may have changed."""
        changed = self._changed.setdefault(place, _Bitmap())
        changed.bits = bits
        changed.pending.update(range(first // _BITS, -(-stop // _BITS)))
        self._pending.add(place)

    def drop(self, place: int) -> None:
        """There is no bitmap at `place` any more. What is in the plan already may be written still."""
        self._changed.pop(place, None)
        self._pending.discard(place)

    @property
    def held_bytes(self) -> int:
        """Memory that the changed bitmaps take."""
        return len(self._changed) * (self._bitmap_bytes + SECTOR)

    def begin_plan(self) -> None:
        """What is pending is in the plan that is being made."""
        for place in self._pending:
            changed = self._changed[place]
            changed.in_plan |= changed.pending
            changed.pending = set()
        self._pending = set()

    def plan_done(self) -> None:
        """What was in the plan is durable."""
        for place, changed in list(self._changed.items()):
            changed.in_plan.clear()
            if not changed.pending:
                del self._changed[place]

    def sector_runs(self) -> Iterator[tuple[int, int, bytes]]:
        """The sectors in the plan: place, byte offset in the bitmap, bytes."""
        for place, changed in self._changed.items():
            for sector in sorted(changed.in_plan):
                yield place, sector * SECTOR, bytes(changed.bits[sector * SECTOR : (sector + 1) * SECTOR])
