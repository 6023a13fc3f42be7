"""The disk for the device model of an HVM guest: an NBD export of the same image on a Unix socket of the process.

Before a guest has a driver for the rings its firmware and its boot loader use an emulated disk, which QEMU reads and
writes. libxl gives QEMU what stands in `physical-device-path` (docs/specs/xen.md, "The device model"). The export and
the rings share one open image, so neither has an older map than the other. The export, with its threads, is there for
as long as a client is.

A device model does not come itself: a keeper (`tapfs.xen.supervisor.device_model_keeper`) has its connection for as
long as the device is there, whichever process serves the disk.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from tapfs.serving.local_socket import listen
from tapfs.serving.log import log
from tapfs.serving.threads import in_thread
from tapfs.xen.device import LIBXL_TAP_KIND
from tapfs.xen.runtime_files import device_model_socket_name, inner_socket_name

if TYPE_CHECKING:
    from tapfs.nbd.clients import Clients
    from tapfs.nbd.export import Export
    from tapfs.xen.device import Device
    from tapfs.xen.disk.backend import Backend


def device_model_keys(device: Device, directory: Path) -> dict[str, str]:
    """What tells libxl where a device model finds the disk; nothing for a disk that is not libxl's."""
    path = str(directory / device_model_socket_name(device))
    if device.kind == LIBXL_TAP_KIND:
        return {"physical-device-path": path}  # libxl makes the address of it
    return {"physical-device-path": f"nbd+unix:///?socket={path}"} if device.made_by_libxl else {}


class DeviceModelDoor:
    """Where device models come in: a socket in `directory`."""

    def __init__(self, backend: Backend, directory: Path) -> None:
        self._backend = backend
        self._disk = backend.disk
        self._path = directory / inner_socket_name(backend.device)
        #: The export, while there is a client.
        self._exports: list[Export] = []
        self._clients: Clients | None = None
        self._watching = trio.CancelScope()
        self._tasks: trio.Nursery | None = None

    async def serve(self) -> None:
        """Let device models in until cancelled. Without the socket the disk is there for the rings alone."""
        try:
            listener = listen(self._path.parent, self._path.name)
        except OSError as error:
            log.error("no HVM guest can boot from the disk: cannot listen at %s: %s", self._path, error.strerror)
            return
        try:
            with listener:
                await trio.lowlevel.wait_readable(listener)
                # Most disks never have such a client.
                from tapfs.nbd.clients import Clients

                self._clients = Clients(
                    self._exports, path=str(self._path), left=self._look_at_clients, prepare=self._begin
                )
                async with trio.open_nursery() as self._tasks:
                    await self._clients.accept(trio.socket.from_stdlib_socket(listener.dup()), self._tasks)
        finally:
            with suppress(FileNotFoundError):
                self._path.unlink()

    async def _begin(self) -> None:
        """Have the export for a client that has come."""
        async with self._backend.changing:
            if self._exports or self._tasks is None:
                return
            export = await in_thread(self._disk.begin_export)
            self._exports.append(export)
            self._watching = trio.CancelScope()
            self._tasks.start_soon(self._watch, export, self._watching)
            log.info("a device model uses the disk")

    async def _watch(self, export: Export, scope: trio.CancelScope) -> None:
        """Look at each client that goes, and at each request that waits for the image."""
        with scope:
            while True:
                await trio.lowlevel.wait_readable(export.ended_descriptor)
                os.eventfd_read(export.ended_descriptor)
                if export.waits:
                    await self._backend.take_over_now()
                self._look_at_clients()

    def _look_at_clients(self) -> None:
        if self._tasks is not None and self._is_idle():
            self._tasks.start_soon(self._end_if_idle)

    def _is_idle(self) -> bool:
        return self._clients is not None and self._clients.count() == 0 and bool(self._exports)

    async def _end_if_idle(self) -> None:
        """Without clients the export only takes memory."""
        async with self._backend.changing:
            if self._is_idle():
                self._exports.clear()
                self._watching.cancel()
                await trio.lowlevel.checkpoint()  # nobody waits for its descriptor any more
                await in_thread(self._disk.end_export)
                log.info("no device model uses the disk any more")
