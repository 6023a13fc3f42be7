"""The sandbox of the process of one guest's disk: its image, the guest's rings, xenstore, and nothing else of the host.

The process enters it before its first thread. What the disk needs stands in xenstore, so keys are read once more then.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tapfs.disk.open_options import OpenOptions
from tapfs.errors import ErrorKind, ImageError
from tapfs.serving.disk_sandbox import DiskNeeds, enter_for_disk
from tapfs.xen.disk.disk_image import options_of
from tapfs.xen.disk.settings import DiskSettings, read_settings
from tapfs.xen.kernel_backend import letting_go
from tapfs.xen.xenstore.first_look import FirstLook, result_of

if TYPE_CHECKING:
    from tapfs.xen.device import Device
    from tapfs.xen.host import Host

_DEVICES = ("/dev/xen/gntdev", "/dev/xen/evtchn", "/dev/xen/xenbus")

#: Errors of a device that is gone, or of keys that make no sense. The operator hears of them from who serves.
_TOLD_LATER = (ErrorKind.NOT_FOUND, ErrorKind.INVALID_FORMAT, ErrorKind.INVALID_ARGUMENT)


def enter_for_device(device: Device, host: Host, directory: Path, *, xentop: str | None) -> None:
    """Enter the sandbox of the process of `device`, whose files lie in `directory`. Be the only thread.

    `xentop`: the folder for what xentop reads of it.

    Raises ImageError: there is no xenstored.
    """
    settings = _settings(device, host)
    made = tuple(filter(None, (str(directory), host.machine, xentop)))
    needs = DiskNeeds(
        makes=made,
        writes=() if host.machine is not None else (*_DEVICES, *letting_go()),
        key_files=() if settings is None else settings.key_files,
        connects=True,  # xenstored may come back
    )
    if settings is None:
        enter_for_disk(None, OpenOptions(), needs)
    else:
        enter_for_disk(settings.specification.path, options_of(settings), needs)


def _settings(device: Device, host: Host) -> DiskSettings | None:
    try:
        with FirstLook(host) as keys:
            return result_of(read_settings(keys, device))
    except ImageError as error:
        if error.kind in _TOLD_LATER:
            return None
        raise
