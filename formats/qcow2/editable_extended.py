"""The driver of qcow2 images with subclusters that are open for writing, with the edits of a whole image."""

from __future__ import annotations

from tapfs.formats.qcow2.editable import EditableQcow2Driver
from tapfs.formats.qcow2.extended import ExtendedQcow2Driver


class EditableExtendedQcow2Driver(EditableQcow2Driver, ExtendedQcow2Driver):
    """An open image with subclusters, read-write."""
