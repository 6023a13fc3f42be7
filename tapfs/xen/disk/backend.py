"""The backend of one device: follows the states in xenstore and connects the disk to the guest's rings.

On every event the backend reads the two states of the device and takes the step that `backend_states` has for them.
Each write first looks, in the same transaction, whether the device is still there and still wanted by the toolstack. A
key that is written too late would bring back a part of a directory that was removed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from tapfs.errors import ErrorKind, ImageError
from tapfs.serving.log import log
from tapfs.serving.threads import in_thread
from tapfs.xen.device import (
    LIBXL_KIND,
    Device,
    State,
    error_keys,
    parse_state,
    shown_error,
    state_of,
    write_device_keys,
)
from tapfs.xen.disk.backend_keys import disk_keys
from tapfs.xen.disk.backend_states import Ours, Seen, Step, next_step
from tapfs.xen.disk.frontend_connection import FrontendConnection
from tapfs.xen.disk.step_rate import PER_SECOND, StepRate
from tapfs.xen.disk.suspended_guest import rest_when_suspended
from tapfs.xen.kernel_backend import take_from_kernel

if TYPE_CHECKING:
    from tapfs.xen.disk.hand_over import TakeOver
    from tapfs.xen.disk.served_disk import ServedDisk
    from tapfs.xen.disk.settings import DiskSettings
    from tapfs.xen.xenstore.client import XenStore

#: Seconds in state 6 before the backend awaits a frontend that has not said that it begins anew.
_CLOSED_SECONDS = 3.0

#: Seconds that a process which has just started may take to reach xenstored.
_FIRST_SECONDS = 10.0
#: Seconds between two looks whether there is a xenstored again.
_LOST_SECONDS = 0.5


class Backend:
    """One device from state 2 to its end. `run` follows it as long as a connection to xenstore lasts.

    `changing` is held by whoever connects, disconnects, pauses or changes the disk. The rings' journal lies in
    `directory`: while it is there a successor of this process goes on with what was in flight. `token` stands in
    `tapfs/token`: where another stands, or none, the directory is that of another device of the same number.
    `take_over` opens the image anew for the first guest that connects. `guest`: the backend of the guest whose stub
    domain this device is for. Its disk is used by other rings then, and not closed with this device.
    """

    def __init__(
        self,
        device: Device,
        disk: ServedDisk,
        settings: DiskSettings,
        *,
        directory: Path,
        token: str,
        take_over: TakeOver | None = None,
        guest: Backend | None = None,
    ) -> None:
        self.device = device
        self._token = token
        self.disk = disk
        self._guest = guest
        self.rings = disk.rings if guest is None else disk.begin_stub(device.domain)
        self.changing: trio.Lock = trio.Lock() if guest is None else guest.changing
        self._settings = settings
        self.take_over: TakeOver | None = take_over if guest is None else guest.take_over
        #: Of stub domains of the guest.
        self.beside: list[Backend] = []
        self._connection = FrontendConnection(device, self.rings, settings, directory / f"{device.key}.journal")
        self._store: XenStore | None = None
        self._lost: ImageError | None = None
        self._news = trio.Event()
        self._closed_at = -_CLOSED_SECONDS
        self._step_rate = StepRate()
        self._slowed_down = False
        self._done = False
        #: The image is closed for good; only the word for it, state 6, may be missing.
        self._image_closed = False
        self._ring_watch = trio.CancelScope()
        #: Set once there has been a connection to xenstored: requests of an operator may come before.
        self._was_reached = trio.Event()

    async def run(self, store: XenStore) -> None:
        """Follow the device until it is done or gone; then the image is closed. Raises ImageError if xenstored goes."""
        self._store, self._lost = store, None
        self._was_reached.set()
        lost = None
        try:
            async with (
                store.watch(self.device.backend, f"{self.device.frontend}/state") as events,
                trio.open_nursery() as tasks,
            ):
                tasks.start_soon(self._relay, events)
                if self._guest is None and self.device.domain != 0 and self._settings.mode != "r":
                    tasks.start_soon(rest_when_suspended, store, self.device.domain, self.disk, self.changing)
                self._watch_ring(tasks)
                lost = await self._follow(store, tasks)
                tasks.cancel_scope.cancel()
        finally:
            self._store = None
        if lost is not None:
            raise lost

    async def note_waiting(self) -> None:
        """Say in xenstore what the guest's requests wait for, if they do."""
        reason = self.disk.held.reason
        await self.change({"tapfs/waiting": None if reason is None else shown_error(reason)})

    def look_again(self) -> None:
        """Have `run` see what has become possible."""
        self._news.set()
        for backend in self.beside:
            backend.look_again()

    async def change(self, values: Mapping[str, str | int | None], *, only_at: State | None = None) -> bool:
        """Write keys of the device (None: remove) at one moment; False if it is gone or no longer at that state.

        Raises ImageError, io if there is no xenstored at present.
        """
        with trio.move_on_after(_FIRST_SECONDS):
            await self._was_reached.wait()
        if self._store is None:
            raise ImageError(ErrorKind.IO, "xenstored does not answer", op="write the key", path=self.device.backend)
        return await write_device_keys(self._store, self.device, values, only_at=only_at, token=self._token)

    async def take_over_now(self) -> None:
        """Open the image anew for a device model, whose requests wait for that. They fail if it cannot be written."""
        while True:
            async with self.changing:
                if self.take_over is None or self.take_over.done:
                    return
                try:
                    pause = _LOST_SECONDS if self._store is None else await self.take_over.try_it(self._store)
                except ImageError as error:
                    log.error("the device model cannot use the disk: %s", error)
                    await in_thread(self.disk.settle)
                    return
                if pause is None:
                    return
            await trio.sleep(pause)

    @property
    def is_to_take_over(self) -> bool:
        """Whether the image will be opened anew for the first guest, which has not connected yet."""
        return self.take_over is not None and not self.take_over.done

    @property
    def reachable(self) -> bool:
        """Whether there is a xenstored at present, as far as is known."""
        return self._store is not None

    async def announce_size(self) -> None:
        """Have the connected frontends look at the size again: a written state fires, if only its own value."""
        for backend in self.beside:
            await backend.announce_size()
        keys = disk_keys(self.disk, self._settings)
        sectors = {name: keys[name] for name in ("sectors", "physical-sector-size")}
        if not await self.change({**sectors, "state": int(State.CONNECTED)}, only_at=State.CONNECTED):
            await self.change(sectors)

    def leave(self) -> None:
        """Let go of the rings for a successor, who finds them as they are then. Blocks; raises nothing."""
        self._connection.leave()

    # The steps

    async def _follow(self, store: XenStore, tasks: trio.Nursery) -> ImageError | None:
        """Take steps until the device is done; the error if xenstored is lost before."""
        while self._lost is None:
            self._news = trio.Event()
            try:
                async with self.changing:
                    pause = await self._look(store, tasks)
            except ImageError as error:
                return error
            if self._done:
                return None
            if pause == 0:
                await self._slow_down()
            with trio.move_on_after(pause):
                await self._news.wait()
        return self._lost

    async def _slow_down(self) -> None:
        """After a step: wait if the guest has taken too many of late."""
        seconds = self._step_rate.after_step(trio.current_time())
        if seconds > 0 and not self._slowed_down:
            log.warning("the guest connects or closes again and again; it is answered every %g s", 1 / PER_SECOND)
        self._slowed_down = seconds > 0
        await trio.sleep(seconds)

    async def _look(self, store: XenStore, tasks: trio.Nursery) -> float:
        """Take the step for what is there now; the seconds after which to look without news."""
        state = await state_of(store, self.device, token=self._token)
        if state is None:
            log.info("the device is gone")
            await self._disconnect()
            await self._close_image()
            self._done = True
            return 0
        frontend = parse_state(await store.read_if_shown(f"{self.device.frontend}/state"))
        online = await store.read(f"{self.device.backend}/online") != "0"
        seen = Seen(state, frontend, online)
        problem = self.rings.problem()
        if problem is not None:
            error = ImageError(ErrorKind.IO, f"the guest broke the protocol: {problem}", op="serve")
            await self._refuse(seen, error)
            return 0
        ours = Ours(
            self.rings.connected, self._connection.left, self.disk.paused, self._image_closed or self.disk.closed
        )
        return await self._take(next_step(seen, ours), seen, store, tasks)

    async def _take(self, step: Step, seen: Seen, store: XenStore, tasks: trio.Nursery) -> float:
        match step:
            case Step.NOTHING:
                return float("inf")
            case Step.AWAIT_FRONTEND_SOON if (left := self._closed_at + _CLOSED_SECONDS - trio.current_time()) > 0:
                return left
            case Step.AWAIT_FRONTEND | Step.AWAIT_FRONTEND_SOON:
                await self._disconnect()
                await self._flush()
                await self._go(seen, State.INIT_WAIT)
            case Step.CONNECT:
                return await self._connect(seen, store, tasks)
            case Step.CLOSING:
                await self._go(seen, State.CLOSING)
            case Step.CLOSE:
                await self._disconnect()
                await self._flush()
                await self._go(seen, State.CLOSED)
                self._closed_at = trio.current_time()
            case Step.CLOSE_FOR_GOOD:
                await self._disconnect()
                await self._close_image()
                # Where the toolstack has written another state meanwhile, the next look writes state 6 over that one.
                self._done = await self._go(seen, State.CLOSED)
        return 0

    async def _go(self, seen: Seen, state: State) -> bool:
        """Write the state; False if the toolstack has written another meanwhile, or the device is gone."""
        if not await self.change({"state": int(state)}, only_at=seen.backend):
            return False
        if state is not seen.backend:
            log.info("%s", state.name.lower().replace("_", " "))
        return True

    async def _connect(self, seen: Seen, store: XenStore, tasks: trio.Nursery) -> float:
        """Take the frontend's rings; at state 5 the state stays, for the frontend is to close.

        The seconds after which to look again without news: the image may still be another domain's.
        """
        # At 3 the rings may be new ones, of a frontend that began anew while nobody looked: the journal is not theirs.
        resuming = self._connection.left and seen.frontend in (State.CONNECTED, State.CLOSING)
        try:
            if self.take_over is not None and not self.take_over.done:
                # Rings that are taken up again are those of a guest for which a predecessor has opened it.
                wait = await (self.take_over.skip() if resuming else self.take_over.try_it(store))
                if wait is not None:
                    return wait
            if self.device.kind == LIBXL_KIND and not self.disk.simulated:
                # It may have been loaded since the device was claimed.
                await in_thread(partial(take_from_kernel, self.device, seconds=0))
            await self._connection.begin(store, resuming=resuming)
        except ImageError as error:
            if store.lost:
                # Nobody's fault: the rings, and the journal, are for whoever can read the keys again.
                raise
            await self._refuse(seen, error)
            return 0
        self._watch_ring(tasks)
        if seen.backend is not State.CLOSING:
            await self._say_connected(seen)
        return 0

    async def _say_connected(self, seen: Seen) -> None:
        try:
            await self.change(
                {**disk_keys(self.disk, self._settings), "state": int(State.CONNECTED)}, only_at=seen.backend
            )
        except ImageError:
            # Nobody would say it later: let go of the rings as for a successor, and connect again.
            self._ring_watch.cancel()
            await self._connection.leave_for_now()
            raise

    async def _refuse(self, seen: Seen, error: ImageError) -> None:
        """Have nothing to do with a frontend that does not keep to the protocol, until it has closed."""
        log.error("%s", error)
        await self._disconnect()
        await self._flush()
        await self.change({**error_keys(error), "state": int(State.CLOSING)}, only_at=seen.backend)

    async def _disconnect(self) -> None:
        """Let go of the rings for good."""
        self._ring_watch.cancel()
        await self._connection.give_up()

    async def _flush(self) -> None:
        if self.disk.closed:
            return
        try:
            await in_thread(self.disk.image.flush)
        except ImageError as error:
            await self._complain(error)

    async def _close_image(self) -> None:
        self._image_closed = True
        if self._guest is not None:
            await self._flush()
            return
        try:
            await in_thread(self.disk.close)
        except ImageError as error:
            await self._complain(error)

    async def _complain(self, error: ImageError) -> None:
        """Say that writes may be lost; there is nobody left to whom it could be answered."""
        log.error("what was written last may be lost: %s", error)
        await self.change(error_keys(error))

    # Who watches

    async def _relay(self, events: AsyncIterator[str]) -> None:
        try:
            async for _ in events:
                self._news.set()
        except ImageError as error:
            self._lost = error
            self._news.set()

    def _watch_ring(self, tasks: trio.Nursery) -> None:
        descriptor = self.rings.ended_descriptor
        if descriptor is not None:
            self._ring_watch = trio.CancelScope()
            tasks.start_soon(self._await_end, descriptor, self._ring_watch)

    async def _await_end(self, descriptor: int, scope: trio.CancelScope) -> None:
        with scope:
            await trio.lowlevel.wait_readable(descriptor)
            self._news.set()
