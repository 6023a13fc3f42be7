"""The drivers of VHDs that are open for writing, with the edits of a whole image (`tapfs.edit_protocols`)."""

from __future__ import annotations

from collections.abc import Iterator

from tapfs.formats.rounding import round_up
from tapfs.formats.vhd.dynamic_header import SECTOR
from tapfs.formats.vhd.fixed import FixedDriver
from tapfs.formats.vhd.footer import LENGTH
from tapfs.formats.vhd.resize import footer_of, make_room, resize
from tapfs.formats.vhd.writer import WritableDynamicDriver
from tapfs.formats.zero_steps import zero_steps
from tapfs.plan import Plan, Shorten, Write, plan


class EditableDynamicDriver(WritableDynamicDriver):
    """An open image that grows, read-write."""

    def make_room(self, size: int) -> Iterator[Plan]:
        """See :meth:`tapfs.driver.Resizable.make_room`."""
        return make_room(self, size)

    def resize(self, size: int) -> Iterator[Plan]:
        """See :meth:`tapfs.driver.Resizable.resize`."""
        return resize(self, size)


class EditableFixedDriver(FixedDriver):
    """An open fixed image, read-write.

    There is one footer, at the end, and it must be right at any moment. So a larger file first ends with a footer of
    the old size. The old footer, which is in the way, becomes zeros. Then the last footer says the new size.
    """

    def make_room(self, size: int) -> Iterator[Plan]:
        """Nothing: the file grows with the size. Raises ImageError(out_of_bounds)."""
        footer_of(self.footers.footer, size, self._file.path)
        return iter(())

    def resize(self, size: int) -> Iterator[Plan]:
        """See :meth:`tapfs.driver.Resizable.resize`."""
        return self._resized(round_up(size, SECTOR))

    def _resized(self, size: int) -> Iterator[Plan]:
        now, last = self.geometry.virtual_size, self.footers.place
        wanted = footer_of(self.footers.footer, size, self._file.path).pack()
        behind = self._file.size()
        if size > last:
            # Of a footer with 511 bytes the last one is not there.
            yield plan([Write(0, size, self.footers.footer.pack())])
        if size > now:
            yield plan(list(zero_steps(self._file, now, min(size, behind))))
        yield plan([Write(0, max(size, last), wanted)])
        if size < last:
            yield plan([Write(0, size, wanted)], [Shorten(0, size + LENGTH)])
