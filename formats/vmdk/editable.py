"""The driver of a VMDK that is open for writing, with the edits of a whole image (`tapfs.edit_protocols`)."""

from __future__ import annotations

from collections.abc import Iterator

from tapfs.formats.vmdk.resize import make_room, resize
from tapfs.formats.vmdk.writer import WritableVmdkDriver
from tapfs.plan import Plan


class EditableVmdkDriver(WritableVmdkDriver):
    """An open disk, read-write."""

    def make_room(self, size: int) -> Iterator[Plan]:
        """See :meth:`tapfs.driver.Resizable.make_room`."""
        return make_room(self, size)

    def resize(self, size: int) -> Iterator[Plan]:
        """See :meth:`tapfs.driver.Resizable.resize`."""
        return resize(self, size)
