"""A disk's directories in xenstore as libxl 4.17 writes and removes them (tools/libs/light: disk, device)."""

from __future__ import annotations

from tapfs.xen.device import DOMAINS, Device
from tapfs.xen.xenstore.client import Store, XenStore

SCRIPT = "/etc/xen/scripts/block-tapfs"


async def add_disk(
    store: XenStore, device: Device, params: str, mode: str = "w", *, script: str = SCRIPT, **more: str | int
) -> None:
    """`xl block-attach`, or a disk of a new domain: all keys at one moment. `more` are keys that are otherwise then."""
    back: dict[str, str | int] = {
        "frontend": device.frontend,
        "params": params,
        "script": script,
        "frontend-id": device.domain,
        "online": 1,
        "removable": 0,
        "bootable": 1,
        "state": 1,
        "dev": device.name,
        "type": "phy",
        "mode": mode,
        "device-type": "disk",
        "discard-enable": int(mode == "w"),
    }
    front: dict[str, str | int] = {
        "backend": device.backend,
        "backend-id": device.backend_domain,
        "state": 1,
        "virtual-device": device.number,
        "device-type": more.get("device-type", "disk"),
    }

    async def write(keys: Store) -> None:
        # First the directories with their permissions, which what is made below inherits.
        for path, permissions, values in (
            (device.frontend, [f"n{device.domain}", f"r{device.backend_domain}"], front),
            (device.backend, [f"n{device.backend_domain}", f"r{device.domain}"], back | more),
        ):
            await keys.remove(path)
            await keys.make_directory(path)
            await keys.set_permissions(path, permissions)
            for name, value in values.items():
                await keys.write(f"{path}/{name}", value)

    await store.transact(write)


async def ask_for_removal(store: XenStore, device: Device) -> None:
    """The first half of `xl block-detach`: the backend is to close, for good."""

    async def write(keys: Store) -> None:
        await keys.write(f"{device.backend}/online", 0)
        await keys.write(f"{device.backend}/state", 5)

    await store.transact(write)


async def remove_disk(store: XenStore, device: Device) -> None:
    """The second half, when the backend has closed; of a domain that is destroyed it comes after a while anyway."""

    async def remove(keys: Store) -> None:
        await keys.remove(device.backend)
        await keys.remove(device.frontend)

    await store.transact(remove)


async def name_machine(store: XenStore, domain: int, uuid: str) -> None:
    """Say which virtual machine a domain is."""
    await store.write(f"{DOMAINS}/{domain}/vm", f"/vm/{uuid}")
