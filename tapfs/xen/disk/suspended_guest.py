"""Bring a disk to rest when its guest is suspended, for another domain may go on with the image then.

This is the source's end of a migration and of a save (`hand_over` has the destination's). A guest that goes on sees a
pause as long as a flush takes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import trio

from tapfs.errors import ImageError
from tapfs.serving.log import log
from tapfs.serving.threads import in_thread
from tapfs.xen.device import DOMAINS

if TYPE_CHECKING:
    from tapfs.xen.disk.served_disk import ServedDisk
    from tapfs.xen.xenstore.client import Store, XenStore

#: Fires when a domain is suspended or ends, whichever it is.
_RELEASED = "@releaseDomain"
#: Seconds between the request that a guest suspend itself and its doing so.
_SUSPEND_SECONDS = 120.0

#: A suspended guest leaves requests in its rings. So often, after so many seconds, it is seen whether it was at work.
_REST_ROUNDS = 3
_REST_SECONDS = 0.05


async def rest_when_suspended(store: XenStore, domain: int, disk: ServedDisk, changing: trio.Lock) -> None:
    """Bring the disk to rest whenever its domain is suspended, until cancelled. Ends when xenstored goes.

    A driver domain is told of that as far as domain 0 shows it the guest (`tapfs.xen.shown_guests`).
    """

    async def rest() -> None:
        await _rest(disk, changing)

    with suppress(ImageError):  # whoever follows the device notices, too
        await _follow_suspends(store, domain, rest)


async def _follow_suspends(store: XenStore, domain: int, rest: Callable[[], Awaitable[None]]) -> None:
    """Call `rest` when the domain has been suspended, until cancelled. It is called in vain now and then.

    xenstore says that some domain was suspended or has ended, and whether ours was asked for it a while before. Raises
    the ImageError of `rest`, and ImageError(io) if xenstored goes.
    """
    request = f"{DOMAINS}/{domain}/control/shutdown"
    asked = -_SUSPEND_SECONDS
    # Both paths are yielded once at first.
    unseen = {request, _RELEASED}
    async with store.watch(request, _RELEASED) as events:
        async for path in events:
            if path in unseen:
                unseen.discard(path)
                if path == _RELEASED or not await store.read_if_shown(request):
                    continue
            if path == request:
                asked = trio.current_time()
            elif trio.current_time() - asked < _SUSPEND_SECONDS or await _suspends_unasked(store, domain):
                await rest()


async def _suspends_unasked(store: Store, domain: int) -> bool:
    """Whether the guest has an event channel by which it is asked, past xenstore."""
    return await store.read_if_shown(f"{DOMAINS}/{domain}/device/suspend/event-channel") is not None


async def _rest(disk: ServedDisk, changing: trio.Lock) -> None:
    """Bring the image to rest, and what the guest had asked for last is in it."""
    for _ in range(_REST_ROUNDS):
        async with changing:
            if disk.closed:
                return
            if disk.held.reason is not None:
                log.error("what was written last may be lost to a migration: %s", disk.held.reason)
                return
            answered = disk.answered
            try:
                await in_thread(disk.rest)
            except ImageError as error:
                log.error("what was written last may be lost to a migration: %s", error)
        await trio.sleep(_REST_SECONDS)
        if disk.answered == answered and disk.job is not None:
            # Another domain may have the image next, and only we know what the job is about to do with it.
            await _end_job(disk)
        elif disk.answered == answered:
            log.info("at rest: a domain was suspended or has ended")
            return


async def _end_job(disk: ServedDisk) -> None:
    while True:
        job = disk.job
        if job is None:
            return
        job.end()
        await trio.sleep(_REST_SECONDS)
