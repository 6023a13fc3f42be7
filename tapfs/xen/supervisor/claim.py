"""Claim a new device: take it from the kernel's own backend, and write the features that we offer."""

from __future__ import annotations

import os
from functools import partial

from tapfs.serving.threads import in_thread
from tapfs.xen.device import LIBXL_KIND, Device, State, state_of, write_keys
from tapfs.xen.kernel_backend import take_from_kernel
from tapfs.xen.xenstore.client import Store, XenStore

#: Rings of up to 1 << 4 pages, as large as the protocol has them, and what the engine takes in an indirect request.
_RING_PAGE_ORDER = 4
_INDIRECT_SEGMENTS = 256
_MAX_QUEUES = 4


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
        grants = await keys.read(f"{device.backend}/tapfs/grants")
        offers: dict[str, str | int] = {
            "max-ring-page-order": _RING_PAGE_ORDER,
            "multi-queue-max-queues": min(os.cpu_count() or 1, _MAX_QUEUES),
            "feature-max-indirect-segments": _INDIRECT_SEGMENTS,
            "feature-persistent": int(grants == "persistent"),
            "feature-flush-cache": writable,
            "feature-barrier": writable,
            "tapfs/status": "starting",
            "state": State.INIT_WAIT,
        }
        # The guest may read what libxl made; it need not know what runs here.
        await keys.make_directory(f"{device.backend}/tapfs")
        await keys.set_permissions(f"{device.backend}/tapfs", ["n0"])
        await write_keys(keys, device, offers)

    await store.transact(write)
