"""Hand a disk over between two domains of one virtual machine: both ends of a migration, and of a save and restore.

The toolstack attaches a disk to the destination while the source still has it, and destroys the source only when the
destination's guest runs. So the two ends keep to this order:

* The source brings its image to rest when its domain is suspended (`suspended_guest`): every write of the guest is
  durable then, and the image says that nobody writes it.
* The destination only looks at the image at first. It opens the image for writing when its guest connects (`TakeOver`),
  for then the source's guest runs no more. What it had read before is dropped.
* Where both see the locks of the image, the destination waits as long as the source has it.

A destination cannot always be told from a new guest, so a disk of libxl is always opened anew for its first guest.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import trio

from tapfs.errors import ErrorKind, ImageError
from tapfs.host.location import locate
from tapfs.serving.log import log
from tapfs.serving.threads import in_thread
from tapfs.xen.device import DOMAINS, our_devices
from tapfs.xen.disk.disk_image import look_at_disk
from tapfs.xen.disk.settings import read_settings
from tapfs.xen.shown_guests import await_shown, machine_of

if TYPE_CHECKING:
    from tapfs.disk.image import Image
    from tapfs.xen.device import Device
    from tapfs.xen.disk.served_disk import ServedDisk
    from tapfs.xen.disk.settings import DiskSettings
    from tapfs.xen.xenstore.client import Store

#: The end of the name that xl gives to a domain whose memory is still coming.
_INCOMING = "--incoming"

#: Seconds that others than the same virtual machine may keep the image after the guest has come: a process of this host
#: that is ending, or the source on another host. And seconds between two looks.
_LOCKED_SECONDS = 30.0
_LOCKED_PAUSE = 0.2


def is_handed_over(device: Device, settings: DiskSettings) -> bool:
    """Whether two domains of one virtual machine can meet at this disk: libxl made it, and its file is written."""
    return device.made_by_libxl and settings.mode != "r" and not locate(settings.specification.path).in_memory


async def is_incoming(store: Store, device: Device) -> bool:
    """Whether the virtual machine of a new disk is known to come from another host, or from another domain here."""
    await await_shown(store, device)
    name = await store.read_if_shown(f"{DOMAINS}/{device.domain}/name") or ""
    return name.endswith(_INCOMING) or await _has_it_elsewhere(store, device)


async def _has_it_elsewhere(store: Store, device: Device) -> bool:
    """Whether another domain of the same virtual machine (by its uuid) has the disk of this number, served by tapfs."""
    machine = await machine_of(store, device.domain)
    if not machine:
        return False
    others = {
        other.domain
        for other in await our_devices(store)
        if other.number == device.number and other.domain != device.domain
    }
    return any([await machine_of(store, domain) == machine for domain in others])


class TakeOver:
    """Opens the image of a disk anew, once, when the first guest connects. `opened` opens it for that guest."""

    def __init__(self, device: Device, disk: ServedDisk, opened: Callable[[DiskSettings], Image]) -> None:
        self._device = device
        self._disk = disk
        self._opened = opened
        self._give_up: float | None = None
        #: Whether the image is the one that the guest uses.
        self.done = False

    async def skip(self) -> None:
        """The image is the one that the guest uses already."""
        await in_thread(self._disk.settle)
        self.done = True

    async def try_it(self, store: Store) -> float | None:
        """None: done. Otherwise the image is in use, and these are the seconds after which to try again.

        Raises the ImageError that keeps the image from being opened. The disk has a view of it then, as before.
        """
        settings = await read_settings(store, self._device)
        try:
            await in_thread(partial(self._open_anew, settings))
        except ImageError as error:
            if error.kind is not ErrorKind.LOCKED or not await self._is_worth_waiting(store, error):
                raise
            return _LOCKED_PAUSE
        self.done = True
        return None

    def _open_anew(self, settings: DiskSettings) -> None:
        with self._disk.device_model_at_rest():
            if self._disk.image.writable:
                # Two open files of one process would lock each other out. A view is to show what is in the old one.
                self._disk.image.flush()
                self._disk.replace(look_at_disk(settings)).close()
            self._disk.replace(self._opened(settings)).close()
        self._disk.settle()

    async def _is_worth_waiting(self, store: Store, error: ImageError) -> bool:
        now = trio.current_time()
        first = self._give_up is None
        if self._give_up is None or await _has_it_elsewhere(store, self._device):
            self._give_up = now + _LOCKED_SECONDS
        if first:
            log.info("waiting: %s", error)
        return now < self._give_up
