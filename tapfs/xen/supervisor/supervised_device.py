"""One device under its supervisor: claimed, served by a process, served again after a crash, removed."""

from __future__ import annotations

import signal
from enum import Enum, auto
from functools import partial
from pathlib import Path
from typing import NamedTuple

import trio

from tapfs.errors import ErrorKind, ImageError
from tapfs.host.location import locate
from tapfs.serving.log import log
from tapfs.serving.processes import EXIT_DONE, EXIT_STOPPED
from tapfs.serving.threads import in_thread
from tapfs.xen.device import (
    OUR_KIND,
    Device,
    State,
    guest_lives,
    is_ours,
    parse_state,
    shown_error,
    with_names,
    write_device_keys,
)
from tapfs.xen.image_stamp import NEVER_OPENED, GivenUp, how_it_stands
from tapfs.xen.process_handle import EXIT_FAILED, RunningDisk, adopt
from tapfs.xen.runtime_files import remove_runtime_files, remove_xentop_folder
from tapfs.xen.specification import parse_specification
from tapfs.xen.supervisor.claim import claim
from tapfs.xen.supervisor.disk_starter import DiskStarter
from tapfs.xen.supervisor.restarts import Restarts
from tapfs.xen.supervisor.stub_domain import disk_of_guest, serve_with
from tapfs.xen.toolstack.attach import remove_device
from tapfs.xen.xenstore.client import XenStore

#: Between looks at a process that lives and has not said its name yet.
_LOOK_SECONDS = 0.05


class _Step(Enum):
    """What a device that no process serves needs."""

    NOTHING = auto()
    CLAIM = auto()
    START = auto()
    END_CLOSING = auto()
    FORGET = auto()


class _Look(NamedTuple):
    """What xenstore says of a device."""

    state: State
    online: bool
    status: str | None
    domain_lives: bool
    frontend: State


class SupervisedDevice:
    """One device. `news` is to be called whenever something in its directory, or its domain, may have changed."""

    def __init__(
        self,
        device: Device,
        store: XenStore,
        directory: Path,
        *,
        machine: str | None,
        starter: DiskStarter,
        restarts: Restarts | None = None,
    ) -> None:
        self.device = device
        #: How the log calls it.
        self._name = str(device)
        #: The process that serves it now; it outlives this object.
        self.process: RunningDisk | None = None
        self._store = store
        self._directory = directory
        self._machine = machine
        self._starter = starter
        self._restarts = Restarts() if restarts is None else restarts
        self._news = trio.Event()
        #: Whether the process is that of a guest's disk, which serves this device of the guest's stub domain beside it.
        self.shared = False
        self._done = False
        #: Whether we have seen it fail. What failed under our predecessor is tried once more.
        self._failed = False
        #: The stamp of the image when the last process that may have written it had ended.
        self._standing: str | None = None

    def news(self) -> None:
        """Have it look at xenstore again."""
        self._news.set()

    async def run(self) -> None:
        """Attend to the device until its directory is gone and no process serves it any more.

        Cancelled, or with the ImageError of a xenstored that is gone or refuses, it leaves the process running. It may
        be called again then.
        """
        self._name = await with_names(self._store, self.device)
        if self.process is None:
            await self._adopt()
        while True:
            if self.process is not None:
                await self._attend(self.process)
            self._news = trio.Event()
            look = await self._look()
            if look is None:
                if self._news.is_set():
                    continue  # made again meanwhile
                break
            if not await self._take(self._next_step(look)):
                await self._news.wait()
        if not remove_runtime_files(self._directory, self.device.key):
            log.warning("%s: is gone, but its process still has something to do", self._name)
        log.info("%s: gone", self._name)

    def _next_step(self, look: _Look) -> _Step:
        """What to do for a device that no process serves."""
        if self.device.kind == OUR_KIND and not look.domain_lives:
            return _Step.FORGET
        ended = look.state is State.CLOSED and not look.online
        if ended and self.device.kind == OUR_KIND:
            return _Step.FORGET
        if look.status is None:
            self._done = self._failed = False  # new, if only by its number
            unclaimed = {
                State.INITIALISING: _Step.CLAIM,
                State.INIT_WAIT: _Step.CLAIM,
                State.CLOSING: _Step.END_CLOSING,
            }
            return unclaimed.get(look.state, _Step.NOTHING)
        if look.status == "failed" and (self._failed or not look.online):
            # No process serves the device, so the supervisor answers a toolstack that wants to remove it.
            let_go = not look.online or look.frontend in (State.CLOSED, State.UNKNOWN)
            return _Step.END_CLOSING if look.state is State.CLOSING and let_go else _Step.NOTHING
        # A toolstack that wants a device to stay after all gets another process for it.
        done = self._done and not look.online
        if done and look.state is State.CLOSING:
            # It writes `online` and `state` one by one, and the process had closed by the first of them.
            return _Step.END_CLOSING
        return _Step.NOTHING if ended or done or look.state is State.UNKNOWN else _Step.START

    async def _take(self, step: _Step) -> bool:
        """Take a step; False: there is none before the next news."""
        match step:
            case _Step.CLAIM:
                return await self._claim()
            case _Step.START:
                return await self._start()
            case _Step.END_CLOSING:
                await write_device_keys(self._store, self.device, {"state": State.CLOSED}, only_at=State.CLOSING)
                return True
            case _Step.FORGET:
                await remove_device(self._store, self.device)
                return True
            case _Step.NOTHING:
                return False

    async def _claim(self) -> bool:
        image = await self._read("params") or ""
        try:
            await claim(self._store, self.device, simulated=self._machine is not None)
        except ImageError as error:
            await self._fail(f"cannot be claimed: {error}")
        else:
            log.info("%s: new, %s", self._name, image)
        return True

    async def _start(self) -> bool:
        guest = await disk_of_guest(self._store, self.device)
        if guest is not None:
            return await self._share(guest)
        try:
            self.process = await in_thread(partial(self._starter.start, self.device, self._directory))
        except ImageError as error:
            await self._fail(str(error))
            return True
        if self.process is not None:
            log.info("%s: served by process %d", self._name, self.process.pid)
            await write_device_keys(self._store, self.device, {"tapfs/process": self.process.name})
            return True
        # Somebody serves it whom our predecessor had just started, or who is just ending.
        await trio.sleep(_LOOK_SECONDS)
        await self._adopt()
        return True

    async def _share(self, guest: Device) -> bool:
        """Have the process of the guest's disk serve it, too."""
        try:
            if not await serve_with(self._store, guest, self.device):
                await trio.sleep(_LOOK_SECONDS)
                return True
        except ImageError as error:
            await self._fail(str(error))
            return True
        await self._adopt()
        return True

    async def _adopt(self) -> None:
        """Find the process that serves it already, if one does."""
        self.shared = await disk_of_guest(self._store, self.device) is not None
        self.process = adopt(await self._read("tapfs/process"))
        if self.process is not None:
            log.info("%s: found its process %d at work", self._name, self.process.pid)

    async def _attend(self, process: RunningDisk) -> None:
        """Wait for the end of the process, or of this device in one that is shared, and see what that means."""
        code: int | None = EXIT_DONE
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._oversee, process, nursery.cancel_scope)
            code = await process.ended()
            nursery.cancel_scope.cancel()
        self.process = None
        process.close()
        if not self.shared:
            remove_xentop_folder(self.device, process.pid, self._machine)
        look = await self._look()
        if look is None or look.status is None:
            return
        if code == EXIT_DONE:
            self._done = True
            log.debug("%s: its process is done", self._name)
            return
        kind = await self._read("tapfs/error-kind") if look.status == "failed" else None
        never_opened = kind in NEVER_OPENED
        if not never_opened or self._standing is None:
            self._standing = await self._how_the_image_stands()
        if code == EXIT_FAILED or look.status == "failed":
            # Our predecessor may have noted it, when it gave the device up.
            self._note_standing(instead=not never_opened)
            await self._note_failure(look)
        elif code is None and look.state is State.CLOSED and not look.online:
            self._done = True
        else:
            await self._restart(code)

    async def _restart(self, code: int | None) -> None:
        """Wait as long as it is wise before the next start, or give the device up."""
        reason = _reason(code)
        pause = self._restarts.after_crash(trio.current_time())
        if pause is None:
            await self._fail(f"its process ended {self._restarts.most} times within a minute, the last time {reason}")
            return
        when = f" in {pause:g} s" if pause else ""
        log.error("%s: its process ended %s; starting it again%s", self._name, reason, when)
        await trio.sleep(pause)

    async def _oversee(self, process: RunningDisk, attending: trio.CancelScope) -> None:
        """While a process serves the device: see to what the process itself cannot see."""
        while True:
            self._news = trio.Event()
            look = await self._look()
            if self.shared:
                if look is None or look.status is None or (look.state is State.CLOSED and not look.online):
                    attending.cancel()
            elif look is not None and look.status is None:
                # Removed and made again so quickly that the process may not have noticed: it serves the old one.
                process.send(signal.SIGTERM)
            elif look is not None and not look.domain_lives and self.device.kind == OUR_KIND:
                log.info("%s: the domain is gone", self._name)
                await remove_device(self._store, self.device)
            await self._news.wait()

    async def _note_failure(self, look: _Look) -> None:
        if look.status != "failed":
            await self._fail("its process could not serve it, and could not say why")
            return
        self._failed = True
        log.error("%s: given up: %s", self._name, await self._read("tapfs/error") or "it is gone")
        if look.state is State.CONNECTED:
            await write_device_keys(self._store, self.device, {"state": State.CLOSING}, only_at=State.CONNECTED)

    async def _fail(self, reason: str) -> None:
        self._failed = True
        log.error("%s: given up: %s", self._name, reason)
        self._note_standing(instead=False)
        kind = ErrorKind.IO.value
        await write_device_keys(
            self._store,
            self.device,
            {
                "tapfs/error": shown_error(reason),
                "tapfs/error-kind": kind,
                "tapfs/status": "failed",
                "state": State.CLOSING,
            },
        )

    def _note_standing(self, *, instead: bool) -> None:
        if self._standing is not None:
            GivenUp(self._directory, self.device.key).write(self._standing, instead=instead)

    async def _how_the_image_stands(self) -> str | None:
        """As `how_it_stands`; None: nothing names an image, or it is a RAM disk, which is shared anyway."""
        try:
            specification = parse_specification(await self._read("tapfs/spec") or await self._read("params") or "")
            location = locate(specification.path)
        except ImageError:
            return None
        if location.in_memory:
            return None
        return await in_thread(partial(how_it_stands, specification.path), abandoned=True)

    async def _look(self) -> _Look | None:
        """What xenstore says now; None: the device is not there, or not ours any more."""
        state = await self._read("state")
        if state is None or not await is_ours(self._store, self.device):
            return None
        return _Look(
            state=parse_state(state),
            online=await self._read("online") != "0",
            status=await self._read("tapfs/status"),
            domain_lives=await guest_lives(self._store, self.device),
            frontend=parse_state(await self._store.read_if_shown(f"{self.device.frontend}/state")),
        )

    async def _read(self, name: str) -> str | None:
        return await self._store.read(f"{self.device.backend}/{name}")


def _reason(code: int | None) -> str:
    if code is None:
        return "for a reason that nobody saw"
    if code == EXIT_STOPPED:
        return "because somebody asked it to"
    if code >= 0:
        return f"with exit code {code}"
    try:
        return f"by {signal.Signals(-code).name}"
    except ValueError:
        return f"by signal {-code}"
