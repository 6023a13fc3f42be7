"""The driver of a VHDX image that is open for writing, with the edits of a whole image (`tapfs.edit_protocols`)."""

from __future__ import annotations

from collections.abc import Iterator

from tapfs.driver import BackingReference, Driver, Renewing
from tapfs.formats.vhdx.relink import expecting_plans, relink_plans
from tapfs.formats.vhdx.resize import make_room, resize
from tapfs.formats.vhdx.writer import WritableVhdxDriver
from tapfs.plan import Plan


class EditableVhdxDriver(WritableVhdxDriver):
    """An open image, read-write."""

    def make_room(self, size: int) -> Iterator[Plan]:
        """See :meth:`tapfs.driver.Resizable.make_room`."""
        return make_room(self, size)

    def resize(self, size: int) -> Iterator[Plan]:
        """See :meth:`tapfs.driver.Resizable.resize`."""
        return resize(self, size)

    def rebase(self, backing: BackingReference | None, parent: Driver | None) -> Iterator[Plan]:
        """See :meth:`tapfs.driver.Rebasable.rebase` and :mod:`tapfs.formats.vhdx.relink`."""
        return relink_plans(self, backing, parent)

    def expect(self, parent: Renewing | None) -> Iterator[Plan]:
        """See :meth:`tapfs.driver.Expecting.expect`."""
        return expecting_plans(self, parent)
