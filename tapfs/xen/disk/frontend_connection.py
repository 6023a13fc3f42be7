"""The connection of a device to its frontend's rings, with the journal that a successor of this process takes it up by.

The journal has the requests that were taken from the rings and not answered (kernel/src/xen/JOURNAL.md). While its file
is there the rings are to be taken up as they are; it goes when they are let go of for good.
"""

from __future__ import annotations

import os
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tapfs.errors import ImageError, from_os_error
from tapfs.kernel.xen_ring import Grants
from tapfs.serving.log import log
from tapfs.serving.threads import in_thread
from tapfs.xen.disk.frontend_keys import MAX_QUEUES, MAX_RING_PAGE_ORDER, FrontendKeys, read_frontend

if TYPE_CHECKING:
    from tapfs.xen.device import Device
    from tapfs.xen.disk.guest_rings import GuestRings
    from tapfs.xen.disk.settings import DiskSettings
    from tapfs.xen.xenstore.client import Store


class FrontendConnection:
    """One device's. The methods are called one at a time.

    `left`: the rings may be as a predecessor has left them, and nobody has looked at them since.
    """

    def __init__(self, device: Device, rings: GuestRings, settings: DiskSettings, journal: Path) -> None:
        self._device = device
        self._rings = rings
        self._settings = settings
        self._journal_path = journal
        self._journal: int | None = None
        self.left = journal.exists()

    async def begin(self, store: Store, *, resuming: bool) -> None:
        """Serve the rings that the frontend's keys name; `resuming`: first what the journal has.

        Raises ImageError: what the guest wrote may be senseless, and xenstored or the host may fail. Nothing is
        connected then.
        """
        frontend = await self._read_frontend(store)
        grants = await self._grants(store, frontend)
        self._journal = _open_journal(self._journal_path, keep=resuming)
        try:
            await in_thread(partial(self._rings.connect, frontend, grants=grants, journal=self._journal))
        except ImageError:
            self.leave()
            raise
        self.left = False
        log.info(
            "%s: %d ring(s) of %d page(s), %s, grants: %s",
            "connected again" if resuming else "connected",
            len(frontend.rings),
            len(frontend.rings[0].references),
            frontend.protocol.name.lower(),
            grants.name.lower(),
        )

    def leave(self) -> None:
        """Let go of the rings for a successor, who finds them as they are then. Blocks; raises nothing."""
        self._rings.disconnect()
        if self._journal is not None:
            os.close(self._journal)
            self._journal = None

    async def leave_for_now(self) -> None:
        """The same, and this process is the successor."""
        await in_thread(self.leave)
        self.left = True

    async def give_up(self) -> None:
        """Let go of the rings for good: what the frontend has not been answered it will not be."""
        self.left = False
        await in_thread(self.leave)
        with suppress(OSError):
            self._journal_path.unlink()

    async def _read_frontend(self, store: Store) -> FrontendKeys:
        """What the frontend asks for, within what stands in our directory as an offer."""

        async def offered(name: str, least: int, most: int) -> int:
            text = await store.read(f"{self._device.backend}/{name}") or ""
            return min(int(text), most) if text.isascii() and text.isdigit() else least

        return await read_frontend(
            store,
            self._device.frontend,
            page_order=await offered("max-ring-page-order", 0, MAX_RING_PAGE_ORDER),
            queues=await offered("multi-queue-max-queues", 1, MAX_QUEUES),
        )

    async def _grants(self, store: Store, frontend: FrontendKeys) -> Grants:
        """How data comes from the guest: persistent only where we offered it and the frontend took it."""
        if self._settings.grants in (None, "copy"):
            return Grants.COPY
        offered = await store.read(f"{self._device.backend}/feature-persistent") == "1"
        if self._settings.grants == "persistent" and offered and frontend.persistent:
            return Grants.PERSISTENT
        return Grants.MAP


def _open_journal(path: Path, *, keep: bool) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | (0 if keep else os.O_TRUNC)
    try:
        return os.open(path, flags, 0o600)
    except OSError as error:
        raise from_os_error(error, path=str(path), op="open the journal") from error
