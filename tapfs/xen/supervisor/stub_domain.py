"""Find the guest of a stub domain, and have the process of the guest's disk serve the stub domain's as well.

libxl attaches the disks of an HVM guest a second time, to the stub domain that runs its device model. The key `target`
of that domain names the guest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.errors import ErrorKind, ImageError
from tapfs.xen.device import DOMAINS, Device, is_ours
from tapfs.xen.toolstack.control_client import ask

if TYPE_CHECKING:
    from tapfs.xen.xenstore.client import Store


async def disk_of_guest(store: Store, device: Device) -> Device | None:
    """The guest's disk that a stub domain's is, too; None: it is no such disk, or is only read."""
    target = await store.read_if_shown(f"{DOMAINS}/{device.domain}/target") or ""
    if not device.made_by_libxl or not (target.isascii() and target.isdigit()):
        return None
    guest = device._replace(domain=int(target))
    if guest == device or not await is_ours(store, guest):
        return None
    said = [await store.read(f"{each.backend}/{name}") for each in (device, guest) for name in ("params", "mode")]
    return guest if said[:2] == said[2:] and said[1] != "r" else None


async def serve_with(store: Store, guest: Device, device: Device) -> bool:
    """Have the process of the guest's disk serve a stub domain's; False: there is none yet.

    Raises ImageError: the guest's disk cannot be served, or is gone.
    """
    kind, domain, number, _ = device
    try:
        await ask(guest, "serve_stub", kind=kind, domain=domain, number=number)
    except ImageError as error:
        if error.kind not in (ErrorKind.NOT_FOUND, ErrorKind.IO):
            raise
        status = await store.read(f"{guest.backend}/tapfs/status")
        if status == "failed" or not await is_ours(store, guest):
            raise ImageError(ErrorKind.IO, f"the disk of its guest, {guest}, is not served") from error
        return False
    return True
