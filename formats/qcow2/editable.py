"""The drivers of qcow2 images that are open for writing, with the edits of a whole image (`tapfs.edit_protocols`).

Each edit is a function of a module of its own, over the writer; the methods here give it to the core.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tapfs.driver import Cryptography, SlotChange
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.qcow2.bitmap_following import BitmapFollowing
from tapfs.formats.qcow2.bitmap_keeper import BitmapKeeping
from tapfs.formats.qcow2.snapshot_keeper import SnapshotKeeping
from tapfs.plan import Plan


class EditableQcow2Driver(SnapshotKeeping, BitmapKeeping, BitmapFollowing):
    """An open image, read-write."""

    def make_room(self, size: int) -> Iterator[Plan]:
        """See :meth:`tapfs.driver.Resizable.make_room`."""
        from tapfs.formats.qcow2.resize import make_room

        return make_room(self, size)

    def resize(self, size: int) -> Iterator[Plan]:
        """See :meth:`tapfs.driver.Resizable.resize`."""
        from tapfs.formats.qcow2.resize import resize

        return resize(self, size)

    @property
    def preallocations(self) -> tuple[str, ...]:
        """See :meth:`tapfs.driver.Preallocating.preallocations`."""
        from tapfs.formats.qcow2.preallocate import preallocations

        return preallocations(self)

    def preallocate(self, mode: str, start: int, stop: int) -> Iterator[Plan]:
        """See :meth:`tapfs.driver.Preallocating.preallocate`."""
        from tapfs.formats.qcow2.preallocate import preallocate

        return preallocate(self, mode, start, stop)

    def drops_zeros(self, options: Mapping[str, str]) -> bool:
        """See :meth:`tapfs.driver.Amendable.drops_zeros`."""
        from tapfs.formats.qcow2.amend import drops_zero_clusters

        return drops_zero_clusters(self, options)

    def change_slots(self, change: SlotChange, cryptography: Cryptography) -> Iterator[Plan]:
        """See :meth:`tapfs.driver.KeySlotted.change_slots`; the header lies inside the image."""
        from tapfs.formats.luks.slot_changes import change_slots

        place = None if self.encryption is None else self.encryption.place
        if place is None:
            message = "is not encrypted with LUKS, so it has no passwords that could be changed"
            raise ImageError(ErrorKind.UNSUPPORTED, message, path=self.file.path, op="amend")
        return change_slots(self.file, place.start, change, cryptography)

    def amend(self, options: Mapping[str, str]) -> Iterator[Plan]:
        """See :meth:`tapfs.driver.Amendable.amend`."""
        from tapfs.formats.qcow2.amend import amend

        return amend(self, options)
