"""The block device that domain 0's own frontend makes of a disk attached to domain 0."""

from __future__ import annotations

from pathlib import Path

import trio

from tapfs.errors import ErrorKind, ImageError
from tapfs.xen.device import Device
from tapfs.xen.toolstack.attach import remove_device, wait_connected
from tapfs.xen.xenstore.client import XenStore

_CONNECTED_SECONDS = 15.0
_NODE_SECONDS = 10.0
_CLEANING_SECONDS = 10.0
_LOOK_SECONDS = 0.05


async def wait_for_block_device(store: XenStore, device: Device, *, simulated: bool) -> str:
    """Wait until the kernel has made a block device of a disk of domain 0, and return its path.

    One that does not come, or whose wait is cancelled, is detached again. Raises ImageError(io, not_found).
    """
    there = False
    try:
        await wait_connected(store, device, seconds=_CONNECTED_SECONDS)
        path = f"/dev/{device.name}" if simulated else await _node_of(device)
        there = True
    finally:
        if not there:
            with trio.CancelScope(deadline=trio.current_time() + _CLEANING_SECONDS, shield=True):
                await remove_device(store, device)
    return path


async def _node_of(device: Device) -> str:
    folder = Path(f"/sys/bus/xen/devices/vbd-{device.number}/block")
    with trio.move_on_after(_NODE_SECONDS):
        while True:
            node = _node_in(folder)
            if node is not None:
                return node
            await trio.sleep(_LOOK_SECONDS)
    raise ImageError(ErrorKind.IO, f"{device} is connected, but no block device of it has come", path=str(folder))


def _node_in(folder: Path) -> str | None:
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return f"/dev/{names[0]}" if names and Path("/dev", names[0]).exists() else None
