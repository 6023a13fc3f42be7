"""The methods of a writable qcow2 driver that change its bitmaps; the work is in `bitmap_edits.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tapfs.extent import Range
from tapfs.plan import Plan

if TYPE_CHECKING:
    from tapfs.formats.qcow2.edited_image import EditedImage


class BitmapKeeping:
    """A part of a driver: that of a :class:`tapfs.edit_protocols.BitmapKeeper`."""

    def add_bitmap(
        self: EditedImage, name: str, granularity: int | None, *, enabled: bool, ranges: Sequence[Range] = ()
    ) -> Iterator[Plan]:
        """Keep a new bitmap that marks these ranges; see `tapfs.formats.qcow2.bitmap_edits`."""
        from tapfs.formats.qcow2.bitmap_edits import add_bitmap

        return add_bitmap(self, name, granularity, enabled=enabled, ranges=ranges)

    def remove_bitmap(self: EditedImage, name: str) -> Iterator[Plan]:
        """Forget a bitmap."""
        from tapfs.formats.qcow2.bitmap_edits import remove_bitmap

        return remove_bitmap(self, name)

    def enable_bitmap(self: EditedImage, name: str, *, enabled: bool) -> Iterator[Plan]:
        """Have a bitmap note what is written from now on, or not."""
        from tapfs.formats.qcow2.bitmap_edits import enable_bitmap

        return enable_bitmap(self, name, enabled=enabled)

    def store_bitmap(self: EditedImage, name: str, ranges: Sequence[Range]) -> Iterator[Plan]:
        """Have a bitmap mark these ranges and no others."""
        from tapfs.formats.qcow2.bitmap_edits import store_bitmap

        return store_bitmap(self, name, ranges)
