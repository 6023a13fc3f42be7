"""The methods of a writable qcow2 driver that change its snapshots; the work is in `snapshot_edits.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tapfs.plan import Plan

if TYPE_CHECKING:
    from tapfs.formats.qcow2.edited_image import EditedImage


class SnapshotKeeping:
    """A part of a driver: that of a :class:`tapfs.edit_protocols.SnapshotKeeper`."""

    def create_snapshot(self: EditedImage, name: str, seconds: int) -> Iterator[Plan]:
        """Keep the disk as it is now; see `tapfs.formats.qcow2.snapshot_edits`."""
        from tapfs.formats.qcow2.snapshot_edits import create_snapshot

        return create_snapshot(self, name, seconds)

    def apply_snapshot(self: EditedImage, name: str) -> Iterator[Plan]:
        """Make the current disk what a snapshot holds."""
        from tapfs.formats.qcow2.snapshot_edits import apply_snapshot

        return apply_snapshot(self, name)

    def delete_snapshot(self: EditedImage, name: str) -> Iterator[Plan]:
        """Forget a snapshot."""
        from tapfs.formats.qcow2.snapshot_edits import delete_snapshot

        return delete_snapshot(self, name)
