"""Show driver domains what xenstore keeps from them of the guests whose disks they serve.

A driver domain sees no more of a guest than the frontend's directory. So it could not tell a migration from a stranger
that wants the same image, and would bring no image to rest before another host goes on with it. Domain 0 may show any
key to any domain. Its supervisor shows which machine a guest is, and when it is suspended, to the driver domain that
serves disks of libxl to it by our script. A key in that domain's directory says so.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager
from functools import partial

import trio

from tapfs.errors import ErrorKind, ImageError
from tapfs.serving.log import log
from tapfs.xen.device import (
    DOMAINS,
    LIBXL_KINDS,
    Device,
    backends_of,
    device_at,
    devices_of_kind,
    domains,
    guest_lives,
    is_ours,
)
from tapfs.xen.shown_guests import GUEST_KEYS, SHOWS_GUESTS
from tapfs.xen.xenstore.client import Store, XenStore

_INTRODUCED, _RELEASED = "@introduceDomain", "@releaseDomain"


async def show_guests_to_driver_domains(store: XenStore) -> None:
    """Do so for the driver domains that there are and that come, until cancelled.

    What xenstored refuses is logged. Raises the ImageError of a xenstored that is gone.
    """
    attended: dict[int, trio.CancelScope] = {}
    others: set[int] = {0}
    async with store.watch(_INTRODUCED, _RELEASED) as events, trio.open_nursery() as nursery:
        async for _ in events:
            there = set(await domains(store))
            others &= there
            for domain in attended.keys() - there:
                attended.pop(domain).cancel()
            new: list[int] = []
            for domain in sorted(there - attended.keys() - others):
                # It is there before the domain is introduced.
                if await store.read(_mark_of(domain)) is None:
                    others.add(domain)
                else:
                    attended[domain] = trio.CancelScope()
                    new.append(domain)
            if new:
                async with _refusals_logged(store, new):
                    await _show_releases(store, attended)
            for domain in new:
                nursery.start_soon(_attend, store, domain, attended[domain])


@asynccontextmanager
async def _refusals_logged(store: XenStore, driver_domains: Iterable[int]) -> AsyncGenerator[None]:
    """Log what xenstored refuses: the disks of domain 0 itself need nothing of it."""
    try:
        yield
    except ImageError as error:
        if store.lost:
            raise
        whom = ", ".join(map(str, driver_domains))
        log.error("what domain %s is to know of its guests cannot be shown to it: %s", whom, error)


async def _show_releases(store: XenStore, driver_domains: Iterable[int]) -> None:
    """Let driver domains hear that some domain was suspended or has ended."""
    try:
        permissions = await store.permissions(_RELEASED)
    except ImageError:
        # The store that is written in C sets these permissions, and does not tell them.
        permissions = ["n0"]
    await store.set_permissions(
        _RELEASED, list(dict.fromkeys([*permissions, *(f"r{each}" for each in driver_domains)]))
    )


async def _attend(store: XenStore, driver_domain: int, scope: trio.CancelScope) -> None:
    """Show one driver domain the guests of its disks."""
    kinds = [f"{backends_of(driver_domain)}/{kind}" for kind in LIBXL_KINDS]
    shown: set[Device] = set()
    with scope:
        async with _refusals_logged(store, [driver_domain]), store.watch(*kinds) as paths:
            await store.transact(partial(_note, driver_domain=driver_domain))
            log.info("domain %d is a driver domain: it is shown the guests of its disks", driver_domain)
            async for path in paths:
                for device in await _devices(store, path, driver_domain):
                    # The guest has to name the driver domain, too, which might have made the rest up.
                    if not (await is_ours(store, device) and await guest_lives(store, device)):
                        shown.discard(device)
                    elif device not in shown:
                        shown.add(device)
                        async with _refusals_logged(store, [driver_domain]):
                            for name in GUEST_KEYS:
                                await _show(store, f"{DOMAINS}/{device.domain}/{name}", driver_domain)


def _mark_of(domain: int) -> str:
    """The directory that libxl makes of a domain with driver_domain = 1."""
    return f"{DOMAINS}/{domain}/libxl"


async def _note(keys: Store, *, driver_domain: int) -> None:
    """Say that guests are shown; not to a domain that has gone meanwhile, for that would bring its directory back."""
    if await keys.read(_mark_of(driver_domain)) is not None:
        await keys.write(f"{DOMAINS}/{driver_domain}/{SHOWS_GUESTS}", 1)


async def _devices(store: XenStore, path: str, driver_domain: int) -> Iterable[Device]:
    """The devices that a watch event is about."""
    device = device_at(path, driver_domain)
    if device is not None:
        return [device]
    return [each for kind in LIBXL_KINDS for each in await devices_of_kind(store, kind, driver_domain)]


async def _show(store: XenStore, path: str, driver_domain: int) -> None:
    """Let the driver domain read a key, if that is there."""
    permissions = await store.permissions(path)
    if not permissions or f"r{driver_domain}" in permissions:
        return
    try:
        await store.set_permissions(path, [*permissions, f"r{driver_domain}"])
    except ImageError as error:
        if error.kind is not ErrorKind.NOT_FOUND:
            raise
