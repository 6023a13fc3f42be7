"""Stub domains of a disk's guest: domains that run its device model, and have the guest's disk, too.

libxl gives a stub domain devices of its own for the disks of its guest. A second open image would have maps of its own,
and be wrong after the first write of the other. So the guest's process serves both devices, on one image, each by rings
and a journal of its own. The supervisor asks for it (`tapfs.xen.supervisor.stub_domain`), and again after a crash.
"""

from __future__ import annotations

import os
import secrets
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from tapfs.errors import ErrorKind, ImageError
from tapfs.serving.log import log
from tapfs.serving.threads import in_thread
from tapfs.xen.device import Device, with_names, write_device_keys
from tapfs.xen.disk.backend import Backend
from tapfs.xen.disk.settings import read_settings
from tapfs.xen.process_name import process_name
from tapfs.xen.xenstore.client import connect

if TYPE_CHECKING:
    from tapfs.serving.service import Service
    from tapfs.xen.host import Host
    from tapfs.xen.xenstore.client import XenStore

#: Seconds between tries to reach a xenstored that is gone. The guest's requests are served all the while.
_XENSTORED_SECONDS = 1.0


async def follow_device(host: Host, backend: Backend, store: XenStore) -> None:
    """Follow a device until it is done; through another connection if xenstored goes away and comes back."""
    try:
        await backend.run(store)
    except ImageError as error:
        log.error("%s", error)
    else:
        return
    while True:
        await trio.sleep(_XENSTORED_SECONDS)
        try:
            async with connect(host) as again:
                await backend.run(again)
                return
        except ImageError:
            continue  # said once


class StubDomains:
    """The stub domains that use the disk of `guest` as well; each is followed by a task of the service."""

    def __init__(self, host: Host, guest: Backend, directory: Path, service: Service) -> None:
        self._host = host
        self._guest = guest
        self._directory = directory
        self._service = service
        self._beginning = trio.Lock()

    async def serve(self, kind: str, domain: int, number: int) -> None:
        """Serve a stub domain's device from now on; nothing is to be done if it is served. Raises ImageError."""
        device = Device(kind, domain, number, self._guest.device.backend_domain)
        # One at a time: who asks again may not have waited for the answer.
        async with self._beginning:
            if any(each.device == device for each in self._guest.beside):
                return
            async with connect(self._host) as store:
                await self._begin(store, device)

    async def _begin(self, store: XenStore, device: Device) -> None:
        settings = await read_settings(store, device)
        token = await store.read(f"{device.backend}/tapfs/token") or secrets.token_hex(16)
        names = {"tapfs/process": process_name(os.getpid()), "tapfs/token": token}
        await write_device_keys(store, device, names)
        if self._guest.disk.closed:
            raise ImageError(ErrorKind.NOT_FOUND, "the guest's disk is closed", op="serve a stub domain")
        backend = Backend(device, self._guest.disk, settings, directory=self._directory, token=token, guest=self._guest)
        self._guest.beside.append(backend)
        self._service.start(partial(self._follow, backend), "serving a stub domain")
        log.info("a stub domain uses the disk: %s", await with_names(store, device))
        await write_device_keys(store, device, {"tapfs/status": "ready"})

    def leave(self) -> None:
        """Let go of all rings, the guest's, too, for a successor. Blocks; raises nothing."""
        for backend in (self._guest, *self._guest.beside):
            backend.leave()

    async def _follow(self, backend: Backend) -> None:
        async with connect(self._host) as store:
            await follow_device(self._host, backend, store)
        async with self._guest.changing:
            self._guest.beside.remove(backend)
            await in_thread(partial(self._guest.disk.end_stub, backend.rings))
        log.info("the stub domain uses the disk no more: %s", backend.device)
