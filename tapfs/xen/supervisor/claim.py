"""Claim a new device: take it from the kernel's own backend, and write the features that we offer."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import partial

from tapfs.errors import ImageError
from tapfs.serving.threads import in_thread
from tapfs.xen.device import LIBXL_KIND, Device, State, state_of, write_keys
from tapfs.xen.kernel_backend import take_from_kernel
from tapfs.xen.specification import DEFAULT_MEMORY, parse_specification
from tapfs.xen.xenstore.client import Store, XenStore

#: Rings of up to 1 << 4 pages, as large as the protocol has them, and what the engine takes in an indirect request.
_RING_PAGE_ORDER = 4
_INDIRECT_SEGMENTS = 256
_MAX_QUEUES = 4

#: Bytes of memory, as RLIMIT_DATA counts them, that a process takes beside its rings (itself, its threads, the map
#: cache, what its image needs), that a ring takes with its threads, and that each page of the ring adds (persistent
#: grants, which take most). Measured on x86_64.
_BESIDE_RINGS = 96 << 20
_RING_BYTES = 26 << 20
_RING_PAGE_BYTES = 704 << 10


def rings_to_offer(memory: int, processors: int) -> tuple[int, int]:
    """How many rings, and pages of each as a power of two, a process with so many bytes of memory can serve.

    A guest may take all that it is offered. More rings come before larger ones; one of one page is always offered.
    """
    room = memory - _BESIDE_RINGS
    most = min(processors, _MAX_QUEUES)
    queues = max(1, min(most, room // (_RING_BYTES + _RING_PAGE_BYTES)))
    orders = range(_RING_PAGE_ORDER, 0, -1)
    return queues, next((order for order in orders if queues * (_RING_BYTES + (_RING_PAGE_BYTES << order)) <= room), 0)


async def claim(store: XenStore, device: Device, *, simulated: bool) -> None:
    """Make the device ours: write what we offer (xen/include/public/io/blkif.h) and go to state 2.

    Not a word of the image is needed for it: libxl gives up on a backend that stays in state 1 for ten seconds,
    and an image may take longer to open. Raises ImageError.
    """
    if device.kind == LIBXL_KIND and not simulated:
        await in_thread(partial(take_from_kernel, device))

    async def write(keys: Store) -> None:
        if await state_of(keys, device) is None:
            return  # gone meanwhile: writing would bring a part of it back
        writable = int(await keys.read(f"{device.backend}/mode") != "r")
        grants = await _option(keys, device, "grants")
        queues, page_order = rings_to_offer(await _memory_of(keys, device), os.cpu_count() or 1)
        offers: dict[str, str | int] = {
            "max-ring-page-order": page_order,
            "multi-queue-max-queues": queues,
            "feature-max-indirect-segments": _INDIRECT_SEGMENTS,
            "feature-persistent": int(grants == "persistent"),
            "feature-flush-cache": writable,
            "feature-barrier": writable,
            "tapfs/status": "starting",
            "state": State.INIT_WAIT,
        }
        # The guest may read what libxl made; it need not know what runs here.
        await keys.make_directory(f"{device.backend}/tapfs")
        await keys.set_permissions(f"{device.backend}/tapfs", [f"n{device.backend_domain}"])
        await write_keys(keys, device, offers)

    await store.transact(write)


async def _memory_of(keys: Store, device: Device) -> int:
    """The bytes that the process may take. What makes no sense is an error of the process, not of the claim."""
    text = await _option(keys, device, "memory")
    return int(text) if text is not None and text.isascii() and text.isdigit() else DEFAULT_MEMORY


async def _option(keys: Store, device: Device, name: str) -> str | None:
    """An option of `tapfs attach`, or else of the disk string, as the process reads it (`tapfs.xen.disk.settings`)."""
    text = await keys.read(f"{device.backend}/tapfs/{name}")
    if not text:
        with suppress(ImageError):
            options = parse_specification(await keys.read(f"{device.backend}/params") or "").options
            text = dict(options).get(name)
    return text
