"""Helpers for tests of the supervisor: disks, attached as the toolstacks do it, and the guest's driver of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from tapfs.xen import runtime_files
from tapfs.xen.device import Device, parse_vdev
from tapfs.xen.host import Host
from tapfs.xen.toolstack import attach as toolstack
from tapfs.xen.xenstore.client import XenStore, connect
from tests.xen.machine import Machine
from tests.xen.supervisor_process import PATIENCE
from tests.xen.xenbus_frontend import XenbusFrontend
from tests.xen.xenstored import Xenstored, guest_socket

#: Bytes of a disk, and the domain that has it.
SIZE = 1 << 20
GUEST = 3


def disk(vdev: str = "xvda", domain: int = GUEST, kind: str = "tap") -> Device:
    return Device(kind, domain, parse_vdev(vdev))


async def attach(store: XenStore, device: Device, image: Path, *, image_format: str = "sync") -> None:
    with trio.fail_after(PATIENCE):
        await toolstack.attach_and_wait(store, device, params=f"tap:{image_format}:{image}", mode="w")


@asynccontextmanager
async def guest_disk(machine: Machine, device: Device, *, socket: Path | None = None) -> AsyncIterator[XenbusFrontend]:
    """The guest's driver of an attached disk, connected; `socket`: where it speaks to xenstored, if not as a guest."""
    domain = machine.domain(device.domain)
    path = guest_socket(machine.directory, device.domain) if socket is None else socket
    async with connect(Host(str(path), str(machine.directory))) as own:
        frontend = XenbusFrontend(own, domain, device)
        with trio.fail_after(PATIENCE):
            await frontend.connect()
        yield frontend


async def detach(store: XenStore, driver: XenbusFrontend) -> None:
    """Detach a disk whose guest closes it when it is told."""
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(driver.close_when_told)
            await toolstack.detach(store, driver.device, seconds=PATIENCE)


async def eventually(true: Callable[[], bool | Awaitable[bool]]) -> None:
    """Wait until something is so."""
    with trio.fail_after(PATIENCE):
        while True:
            result = true()
            if result if isinstance(result, bool) else await result:
                return
            await trio.sleep(0.01)


async def pid_of(store: XenStore, device: Device) -> int:
    """The process that serves a disk."""
    process = await toolstack.read_process(store, device)
    assert process is not None
    return process[0]


async def another_process(store: XenStore, device: Device, before: int) -> None:
    """Wait until another process than `before` serves a disk."""

    async def is_another() -> bool:
        return await pid_of(store, device) != before

    await eventually(is_another)


def is_gone(xenstored: Xenstored, device: Device) -> bool:
    return not any(path.startswith((device.backend, device.frontend)) for path in xenstored.tree.keys)


def files_of(device: Device) -> list[str]:
    return sorted(path.name for path in runtime_files.directory().iterdir() if path.name.startswith(f"{device.key}."))
