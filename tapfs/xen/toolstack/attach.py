"""Attach and detach disks: write a device's two directories, as xl does for the disks of a configuration.

The backend's directory says what is to be served. The frontend's directory tells the guest its backend. Both sides
talk by the states in them (docs/specs/xen.md, "Handshake"). The supervisor serves every device that appears here,
whichever program wrote the directories.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping

import trio

from tapfs.errors import ErrorKind, ImageError
from tapfs.xen.device import DOMAINS, OUR_KIND, Device, State, backends_of, parse_state
from tapfs.xen.process_name import is_alive, parse_process_name
from tapfs.xen.runtime_files import supervisor_lives
from tapfs.xen.xenstore.client import Store, XenStore

#: A supervisor claims a new disk at once; nobody does if none has in that many seconds. One that lives may still be
#: loading what the processes of disks are forked from, and gets as long as the opening of an image.
_CLAIM_SECONDS = 5.0
#: Opening an image may wait for the lock of a process that is ending (30 s).
_READY_SECONDS = 60.0
#: Seconds that the process of a removed disk may take to end.
_END_SECONDS = 10.0
#: Seconds between looks whether a process lives, which no watch tells.
_LOOK_SECONDS = 0.1
#: Frontends that have nothing to lose; UNKNOWN: there is none (any more).
_UNUSED = (State.UNKNOWN, State.INITIALISING, State.CLOSED)


async def attach(
    store: XenStore, device: Device, *, params: str, mode: str, options: Mapping[str, str | int] | None = None
) -> None:
    """Write the directories of a new disk: backend and frontend at state 1, all at one moment.

    `params` says what is served, `mode` is "r", "w" or "w!", `options` are keys below `tapfs/` of the backend's
    directory. Raises ImageError(exists, not_found), and ImageError(unsupported) outside of domain 0.
    """
    await _require_control(store, "attach", f"with --backend-domain {await store.own_domain()} there")
    server, guest = device.backend_domain, device.domain

    async def write(keys: Store) -> None:
        for domain in (guest, server):
            if await keys.read(f"{DOMAINS}/{domain}") is None:
                raise ImageError(ErrorKind.NOT_FOUND, f"there is no domain {domain}", remedy="`xl list` shows them all")
        await _refuse_existing(keys, device)
        await keys.remove(device.frontend)
        backend_keys = _backend_keys(device, params, mode)
        await _write_directory(keys, device.backend, [f"n{server}", f"r{guest}"], backend_keys)
        # The guest needs none of these, and it need not know what runs here.
        await _write_directory(keys, f"{device.backend}/tapfs", [f"n{server}"], options or {})
        await _write_directory(keys, device.frontend, [f"n{guest}", f"r{server}"], _frontend_keys(device))

    await store.transact(write)


async def attach_and_wait(
    store: XenStore, device: Device, *, params: str, mode: str, options: Mapping[str, str | int] | None = None
) -> None:
    """`attach`, and wait until the disk is served; if that fails (or is cancelled) the directories are removed again.

    Raises what `attach` and `wait_ready` raise.
    """
    await attach(store, device, params=params, mode=mode, options=options)
    ready = False
    try:
        await wait_ready(store, device)
        ready = True
    finally:
        if not ready:
            with trio.move_on_after(_END_SECONDS, shield=True):
                await remove_device(store, device)


async def wait_ready(store: XenStore, device: Device) -> None:
    """Wait until a process has opened the disk's image and serves it.

    Raises the ImageError with which that failed; ImageError(not_found) if no supervisor takes the disk up or its
    directory goes, ImageError(io) if it takes more than a minute.
    """
    async with store.watch(device.backend) as events:
        claimed = await _claimed(store, device, events, _CLAIM_SECONDS)
        if not claimed and not (supervisor_lives() and await _claimed(store, device, events, _READY_SECONDS)):
            there = f" in domain {device.backend_domain}" if device.backend_domain else ""
            raise ImageError(
                ErrorKind.NOT_FOUND,
                f"nobody serves {device}",
                op="attach",
                remedy=f"start `tapfs blktapctrl` (as a service){there}",
            )
        with trio.move_on_after(_READY_SECONDS):
            while True:
                status = await _status(store, device)
                if status == "ready":
                    return
                if status == "failed":
                    raise await _stored_error(store, device)
                await anext(events)
    raise ImageError(ErrorKind.IO, f"{device} is not ready after {_READY_SECONDS:.0f} seconds", op="attach")


async def _claimed(store: XenStore, device: Device, events: AsyncIterator[str], seconds: float) -> bool:
    """Whether somebody takes the disk up in that many seconds."""
    with trio.move_on_after(seconds):
        while await _status(store, device) is None:
            await anext(events)
        return True
    return False


async def wait_connected(store: XenStore, device: Device, *, seconds: float) -> None:
    """Wait until the guest uses the disk (backend state 4), at most that long.

    Raises ImageError(io) if it does not, ImageError(not_found) if the directory goes.
    """
    async with store.watch(f"{device.backend}/state") as events:
        with trio.move_on_after(seconds):
            while parse_state(await store.read(f"{device.backend}/state")) is not State.CONNECTED:
                await _status(store, device)
                await anext(events)
            return
    raise ImageError(
        ErrorKind.IO,
        f"the guest has not taken up {device} in {seconds:g} seconds: {await _frontend_state(store, device)}",
        op="attach",
        remedy="see whether it runs and has the block frontend (xen-blkfront)",
    )


async def detach(store: XenStore, device: Device, *, seconds: float, force: bool = False) -> None:
    """Take a disk away from its guest: ask it to close, wait for that and for the last write, remove the directories.

    Raises ImageError(unsupported) for a disk that xl made and outside of domain 0, ImageError(not_found), and
    ImageError(locked) if the guest does not let go in that many seconds (it may still, later); with `force` the disk
    is then taken from it anyway.
    """
    await _require_control(store, "detach", "there")
    if device.kind != OUR_KIND:
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            f"{device} was attached by xl",
            op="detach",
            remedy=f"use `xl block-detach {device.domain} {device.name}`",
        )

    async def ask(keys: Store) -> None:
        if await keys.read(device.backend) is None:
            raise ImageError(ErrorKind.NOT_FOUND, f"domain {device.domain} has no disk {device.name}", op="detach")
        await keys.write(f"{device.backend}/online", 0)
        if parse_state(await keys.read(f"{device.backend}/state")) is not State.CLOSED:
            await keys.write(f"{device.backend}/state", State.CLOSING)

    await store.transact(ask)
    process = await read_process(store, device) if device.backend_domain == 0 else None
    if not await _closed(store, device, seconds) and not force:
        raise ImageError(
            ErrorKind.LOCKED,
            f"{device} is still in use by the guest after {seconds:g} seconds: {await _frontend_state(store, device)}",
            op="detach",
            remedy="unmount it there and try again, or use --force: what the guest has not written is then lost",
        )
    await remove_device(store, device)
    with trio.move_on_after(_END_SECONDS):
        await _ended(process)


async def remove_device(store: XenStore, device: Device) -> None:
    """Remove both directories of a disk of ours, and those above the backend's that are then empty.

    A driver domain owns the backend's directory and no other: what is left is domain 0's to remove.
    """
    own = await store.own_domain()

    async def remove(keys: Store) -> None:
        await keys.remove(device.backend)
        if own != 0:
            return
        # After a reboot of the host the number may be another's.
        if await keys.read(f"{device.frontend}/backend") == device.backend:
            await keys.remove(device.frontend)
        kinds = f"{backends_of(device.backend_domain)}/{device.kind}"
        for above in (f"{kinds}/{device.domain}", kinds):
            if await keys.list(above):
                return
            await keys.remove(above)

    await store.transact(remove)


async def _require_control(store: XenStore, op: str, how: str) -> None:
    """Raise ImageError(unsupported) unless this is domain 0, which alone may write into the directories of others."""
    if await store.own_domain() != 0:
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            "only domain 0 may do that",
            op=op,
            remedy=f"run tapfs {op} in domain 0, {how}",
        )


async def _refuse_existing(keys: Store, device: Device) -> None:
    other = await keys.read(f"{device.frontend}/backend")
    if await keys.read(device.backend) is None and (other is None or await keys.read(other) is None):
        return
    raise ImageError(
        ErrorKind.EXISTS,
        f"domain {device.domain} has a disk {device.name} already",
        op="attach",
        remedy="detach it first, or choose another --vdev",
    )


async def _write_directory(keys: Store, path: str, permissions: list[str], values: Mapping[str, str | int]) -> None:
    await keys.make_directory(path)
    await keys.set_permissions(path, permissions)  # first: what is made below inherits them
    for name, value in values.items():
        await keys.write(f"{path}/{name}", value)


def _backend_keys(device: Device, params: str, mode: str) -> dict[str, str | int]:
    return {
        "frontend": device.frontend,
        "frontend-id": device.domain,
        "params": params,
        "mode": mode,
        "dev": device.name,
        "device-type": "disk",
        "online": 1,
        "removable": 0,
        "bootable": 1,
        "state": State.INITIALISING,
    }


def _frontend_keys(device: Device) -> dict[str, str | int]:
    return {
        "backend": device.backend,
        "backend-id": device.backend_domain,
        "virtual-device": device.number,
        "device-type": "disk",
        "state": State.INITIALISING,
    }


async def _status(store: Store, device: Device) -> str | None:
    """What the disk's process says of itself. Raises ImageError(not_found) if the device is gone."""
    status = await store.read(f"{device.backend}/tapfs/status")
    if status is None and await store.read(device.backend) is None:
        raise ImageError(ErrorKind.NOT_FOUND, f"{device} was removed meanwhile", op="attach")
    return status


async def _stored_error(store: Store, device: Device) -> ImageError:
    """The error that the disk's process left behind."""
    message = await store.read(f"{device.backend}/tapfs/error")
    name = await store.read(f"{device.backend}/tapfs/error-kind")
    kind = next((kind for kind in ErrorKind if kind.value == name), ErrorKind.IO)
    return ImageError(kind, message or f"{device} cannot be served", op="attach")


async def _closed(store: XenStore, device: Device, seconds: float) -> bool:
    """Wait until the disk is closed, its last write included; False if it is not in that many seconds."""
    async with store.watch(f"{device.backend}/state", f"{device.frontend}/state") as events:
        with trio.move_on_after(seconds):
            while True:
                backend = await store.read(f"{device.backend}/state")
                if backend is None or parse_state(backend) is State.CLOSED:
                    return True
                frontend = parse_state(await store.read(f"{device.frontend}/state"))
                alone = device.backend_domain == 0 and not is_alive(await read_process(store, device))
                if frontend in _UNUSED and alone:
                    return True  # nobody is there to say that it is closed
                with trio.move_on_after(_LOOK_SECONDS):
                    await anext(events)
    return False


async def read_process(store: Store, device: Device) -> tuple[int, int] | None:
    """The process that serves a disk, if one ever did: its number and its start (`processes.process_start`)."""
    return parse_process_name(await store.read(f"{device.backend}/tapfs/process"))


async def _ended(process: tuple[int, int] | None) -> None:
    """Wait until a process runs no more."""
    if process is None:
        return
    try:
        descriptor = os.pidfd_open(process[0])
    except OSError:
        return
    try:
        if is_alive(process):
            await trio.lowlevel.wait_readable(descriptor)
    finally:
        os.close(descriptor)


async def _frontend_state(store: Store, device: Device) -> str:
    state = parse_state(await store.read(f"{device.frontend}/state"))
    return f"its frontend is {state.name.lower().replace('_', ' ')} (state {state.value})"
