"""The keys of a guest that domain 0 shows the driver domain of its disks, and the wait for them.

By itself a driver domain sees no more of a guest than the frontend's directory. The supervisor in domain 0 gives it the
right to read more (`tapfs.xen.supervisor.driver_domains`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from tapfs.serving.log import log
from tapfs.xen.device import DOMAINS

if TYPE_CHECKING:
    from tapfs.xen.device import Device
    from tapfs.xen.xenstore.client import Store

#: Below a driver domain's directory: domain 0 shows it its guests.
SHOWS_GUESTS = "tapfs-shows-guests"

#: The virtual machine of a guest, as a path. It is shown last.
_MACHINE = "vm"
#: Below a guest's directory, in the order in which they are shown: its name, two ways to ask it to suspend itself, its
#: virtual machine.
GUEST_KEYS = ("name", "control/shutdown", "device/suspend/event-channel", _MACHINE)

#: Seconds that domain 0 may take after it has made a disk, and between two looks.
_SHOWN_SECONDS = 5.0
_PAUSE_SECONDS = 0.05


async def machine_of(store: Store, domain: int) -> str | None:
    """The virtual machine that a domain is, as its path in xenstore; None: it has none, or that is not shown."""
    return await store.read_if_shown(f"{DOMAINS}/{domain}/{_MACHINE}")


async def await_shown(store: Store, device: Device) -> None:
    """In a driver domain: wait until the guest of a new disk is shown, if domain 0 does that."""
    own = device.backend_domain
    if own == 0 or await store.read_if_shown(f"{DOMAINS}/{own}/{SHOWS_GUESTS}") is None:
        return
    with trio.move_on_after(_SHOWN_SECONDS):
        while True:
            if await machine_of(store, device.domain) is not None:
                return
            await trio.sleep(_PAUSE_SECONDS)
    log.warning("domain 0 does not show which virtual machine the guest is; is tapfs blktapctrl at work there?")
