"""Hold a disk at rest for a moment: what is done to several disks of a guest meanwhile is done at one moment.

A hold is a pause that ends by itself. It is not noted in xenstore, so nothing that ends whoever asked for it, or this
process, leaves a guest waiting. `release` says whether the hold has lasted until then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from tapfs.serving.log import log
from tapfs.serving.threads import in_thread

if TYPE_CHECKING:
    from tapfs.xen.disk.operations import Operations
    from tapfs.xen.disk.served_disk import ServedDisk


class Holding:
    """The holds of one disk, one at a time."""

    def __init__(self, operations: Operations, disk: ServedDisk) -> None:
        self._operations = operations
        self._disk = disk
        #: Of the last hold; its deadline is the end of that.
        self._scope = trio.CancelScope()

    async def hold(self, seconds: float) -> None:
        """Take no more requests, and have the image durable and at rest, until `release`, for so long at most.

        A disk that an operator has paused is at rest. Raises ImageError.
        """
        async with self._operations.alone():
            self._operations.require_no_job()
            if self._disk.paused:
                return
            async with self._operations.at_rest():
                await in_thread(self._disk.image.flush)
                self._disk.paused = True
            self._operations.held_at_rest = True
            self._scope = trio.CancelScope(deadline=trio.current_time() + seconds)
            trio.lowlevel.spawn_system_task(self._let_go_in_time, self._scope)

    async def release(self) -> bool:
        """Take requests again; whether the disk was held, or paused by an operator, all the time."""
        async with self._operations.alone():
            kept = self._disk.paused
            self._scope.cancel()
            self._let_go()
            return kept

    async def _let_go_in_time(self, scope: trio.CancelScope) -> None:
        with scope:
            await trio.sleep_forever()
        async with self._operations.alone():
            if self._scope is scope and self._operations.held_at_rest:
                log.warning("whoever held the disk at rest has not let it go in time")
                self._let_go()

    def _let_go(self) -> None:
        if self._operations.held_at_rest:
            self._operations.held_at_rest = self._disk.paused = False
            self._disk.resume()
            self._operations.look_again()
