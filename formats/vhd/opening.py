"""The opening of a VHD: the driver that fits its type."""

from __future__ import annotations

from tapfs.driver import Driver, HostFile, OpenRequest
from tapfs.formats.vhd.driver import DynamicDriver
from tapfs.formats.vhd.fixed import FixedDriver
from tapfs.formats.vhd.footer import FIXED
from tapfs.formats.vhd.footers import find_footers
from tapfs.formats.vhd.writability import require_sound


def open_driver(file: HostFile, request: OpenRequest) -> Driver:
    """The driver of an image. Raises ImageError as `Format.open` does, and read_only for damage before writing."""
    footers = find_footers(file)
    if footers.footer.type == FIXED:
        fixed = FixedDriver(file, request, footers)
        if request.writable and not request.lenient:
            require_sound(fixed.findings, file)
            from tapfs.formats.vhd.editable import EditableFixedDriver

            return EditableFixedDriver(file, request, footers)
        return fixed
    if not request.writable:
        return DynamicDriver(file, request, footers)
    from tapfs.formats.vhd.editable import EditableDynamicDriver

    return EditableDynamicDriver(file, request, footers)
