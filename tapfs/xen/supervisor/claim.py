"""Claim a new device: take it from the kernel's own backend, and write the features that we offer."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path

from tapfs.errors import from_os_error
from tapfs.serving.log import log
from tapfs.serving.threads import in_thread
from tapfs.xen.device import LIBXL_KIND, Device, State, state_of, write_keys
from tapfs.xen.xenstore.client import Store, XenStore

_BUS = Path("/sys/bus/xen-backend")
_KERNEL_DRIVER = "vbd"

#: For how long the kernel may take to notice a device that we have noticed.
_KERNEL_SECONDS = 1.0
_LOOK_SECONDS = 0.02

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
        await in_thread(partial(_take_from_kernel, device))

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


def _take_from_kernel(device: Device) -> None:
    """Have xen-blkback let go of the device: where it is loaded it takes every disk of libxl's, ours too."""
    if not (_BUS / "drivers" / _KERNEL_DRIVER).exists():
        return
    name = f"{device.kind}-{device.domain}-{device.number}"
    driver = _BUS / "devices" / name / "driver"
    patience = time.monotonic() + _KERNEL_SECONDS
    while not driver.exists():
        if time.monotonic() > patience:
            return
        time.sleep(_LOOK_SECONDS)
    try:
        (driver / "unbind").write_text(name)
    except FileNotFoundError:
        return  # it has let go by itself
    except OSError as error:
        raise from_os_error(error, path=str(driver / "unbind"), op="take the disk from xen-blkback") from error
    log.info("%s: taken from xen-blkback", device)
