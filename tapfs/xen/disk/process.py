"""The process that serves one disk: ``python -m tapfs.xen.disk.process KIND DOMAIN NUMBER OWN``, OWN being this domain.

`tapfs blktapctrl` starts one process for each disk. The process ends with exit code 0 when the device is gone, and with
3 when the image cannot be opened; xenstore has the reason then. On SIGTERM the process answers and flushes all requests
that it has taken, leaves the rings to the next process, and ends with 75. After a kill -9 the next process does the
requests of the journal again, which were taken and not answered.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import trio

from tapfs.disk.image import Image
from tapfs.disk.live import written_by_others
from tapfs.disk.plan_log import PlanLog
from tapfs.errors import EXIT_BUG, EXIT_USAGE, ErrorKind, ImageError
from tapfs.host.sandbox import confinement
from tapfs.records import replace
from tapfs.serving.control import Answer
from tapfs.serving.disk_operations import RateLimit
from tapfs.serving.failures import InternalError, out_of_memory
from tapfs.serving.held_requests import HeldRequests
from tapfs.serving.live_jobs import LiveJobs
from tapfs.serving.log import log, log_to_stderr
from tapfs.serving.processes import EXIT_DONE, EXIT_STOPPED
from tapfs.serving.runtime_directory import make_private, runtime_directory
from tapfs.serving.service import Service
from tapfs.serving.threads import in_thread
from tapfs.xen.device import Device, State, error_keys, parse_state, shown_error, with_names, write_device_keys
from tapfs.xen.disk import control
from tapfs.xen.disk.backend import Backend
from tapfs.xen.disk.device_model import DeviceModelDoor, device_model_keys
from tapfs.xen.disk.disk_image import look_at_disk, open_disk
from tapfs.xen.disk.hand_over import TakeOver, is_handed_over, is_incoming
from tapfs.xen.disk.held_at_rest import Holding
from tapfs.xen.disk.operations import Operations
from tapfs.xen.disk.process_limits import apply_limits
from tapfs.xen.disk.sandbox import enter_for_device
from tapfs.xen.disk.served_disk import ServedDisk
from tapfs.xen.disk.settings import DiskSettings, read_settings
from tapfs.xen.disk.stub_domains import StubDomains, follow_device
from tapfs.xen.disk.xentop_file import PROCESS_KEY, XentopFile, make_folder
from tapfs.xen.host import Host, find_host
from tapfs.xen.image_stamp import NEVER_OPENED, GivenUp
from tapfs.xen.process_handle import EXIT_FAILED
from tapfs.xen.process_name import process_name
from tapfs.xen.runtime_files import directory, socket_name
from tapfs.xen.xenstore.client import XenStore, connect

#: Seconds that a dying process with I/O under way may keep the image locked, and between two looks.
_LOCKED_SECONDS = 30.0
_LOCKED_PAUSE = 0.1
#: Seconds between two tries to open an image whose unflushed metadata finds no space.
_FULL_PAUSE = 1.0

#: Seconds that the end of a process waits for a pause, a swap, … that is under way.
_OPERATION_SECONDS = 10.0


class DiskProcess:
    """The life of one disk process: the front end of its service."""

    def __init__(self, device: Device, host: Host) -> None:
        self._device = device
        self._host = host
        self._directory = directory()
        self._exit_code: int | None = None
        #: Where xentop looks for the counters of the disk, if it does.
        self._xentop: str | None = None
        self._backend: Backend | None = None
        #: Set when requests have begun or ceased to wait for space.
        self._waiting_changed = trio.Event()
        self._event_loop: trio.lowlevel.TrioToken | None = None
        self._service = Service(str(device), log_names_it=True)

    def run(self) -> int:
        """Serve the disk; the exit code."""
        self.prepare()
        self._xentop = make_folder(self._device, self._host)
        enter_for_device(self._device, self._host, self._directory, xentop=self._xentop)
        try:
            self._service.run(self)
        except ImageError as failure:
            if self._exit_code is None:
                return EXIT_BUG if isinstance(failure, InternalError) else failure.exit_code
        return EXIT_STOPPED if self._exit_code is None else self._exit_code

    def prepare(self) -> None:
        """Have the runtime directories."""
        make_private(runtime_directory())
        make_private(self._directory)

    async def serve(self) -> None:
        """Open the image and answer the guest and operators until the device is done."""
        async with connect(self._host) as store:
            log_to_stderr(await with_names(store, self._device))
            self._exit_code = await self._open_and_follow(store)

    async def end(self) -> None:
        """End in order. What an operator has begun needs xenstore to its end, but not for long: it may hang."""
        if self._exit_code is None:
            self._exit_code = EXIT_STOPPED
        if self._backend is not None:
            await self._leave_waiting(self._backend.disk)
            with trio.move_on_after(_OPERATION_SECONDS):
                async with self._backend.changing:
                    pass
        self._service.stop_serving()

    async def _open_and_follow(self, store: XenStore) -> int:
        # A number may be another device's one day: what is ours is told by the token.
        token = await store.read(f"{self._device.backend}/tapfs/token") or secrets.token_hex(16)
        await write_device_keys(store, self._device, {"tapfs/process": process_name(os.getpid()), "tapfs/token": token})
        plan_log = PlanLog(self._directory / f"{self._device.key}.plan", token)
        ending = self._service.ending
        ending.add("remove the control socket", self._remove_socket)
        ending.add("close the plan log", plan_log.close)
        try:
            settings, disk = await self._open(store, plan_log)
        except ImageError as error:
            if await store.read(f"{self._device.backend}/state") is None:
                return EXIT_DONE
            log.error("%s", error)
            await write_device_keys(store, self._device, {**error_keys(error), "tapfs/status": "failed"})
            return EXIT_FAILED
        take_over = None
        if disk.opened_anew:
            take_over = TakeOver(self._device, disk, lambda settings: self._opened(settings, plan_log))
        self._backend = backend = Backend(
            self._device, disk, settings, directory=self._directory, token=token, take_over=take_over
        )
        stubs = StubDomains(self._host, backend, self._directory, self._service)
        # A successor may open the image when this is done, and finds the rings as they are left.
        ending.add("let go of the rings", stubs.leave)
        ending.add_async("wait for an operation", backend.changing.acquire)
        operations = Operations(backend, settings, plan_log)
        jobs = LiveJobs(operations, disk, plan_log, key_file=settings.key_files)
        answer = partial(control.answer, jobs, Holding(operations, disk), stubs)
        return await self._follow(store, backend, answer)

    async def _open(self, store: XenStore, plan_log: PlanLog) -> tuple[DiskSettings, ServedDisk]:
        """Set our limits and open the image. Raises the ImageError that keeps the disk from being served."""
        settings = await read_settings(store, self._device)
        apply_limits(settings)
        # Who was served once may have a process that is still ending.
        state = parse_state(await store.read(f"{self._device.backend}/state"))
        served_before = await store.read(f"{self._device.backend}/tapfs/status") == "ready"
        # An overlay that was made meanwhile is no reason to take the disk from a guest that writes it.
        settings = replace(settings, write_base=settings.write_base or served_before)
        connected = state in (State.CONNECTED, State.CLOSING)
        try:
            if is_handed_over(self._device, settings) and not connected and await is_incoming(store, self._device):
                image = await in_thread(partial(look_at_disk, settings))
            else:
                opened = partial(self._opened, settings, plan_log)
                wanted = served_before or connected
                image = await self._patiently(store, opened, settings) if wanted else await in_thread(opened)
        except MemoryError as error:
            raise out_of_memory(settings.specification.path) from error
        limit = RateLimit(settings.limit_bytes, settings.limit_requests)
        disk = ServedDisk(
            image,
            machine=self._host.machine,
            domain=self._device.domain,
            limit=limit,
            paused=settings.paused,
            held=HeldRequests(settings.wait_on, self._tell_of_waiting),
            discard=settings.discard,
            opened_anew=is_handed_over(self._device, settings),
        )
        self._service.ending.add("flush and close the image", disk.close)
        if settings.mode == "w!" and not image.layers[0].driver.geometry.identity:
            others = await in_thread(partial(written_by_others, image))
            if others is not None:
                log.warning("%s; two writers destroy a %s image unless they take turns", others, image.format_name)
        return settings, disk

    async def _patiently(self, store: XenStore, opened: Callable[[], Image], settings: DiskSettings) -> Image:
        """The image for a guest that waits for it: tried again while it is locked, for a while, and the host full."""
        give_up = trio.current_time() + _LOCKED_SECONDS
        told = False
        while True:
            try:
                return await in_thread(opened)
            except ImageError as error:
                full = error.kind is ErrorKind.NO_SPACE and settings.wait_on != "nothing"
                if not full and (error.kind is not ErrorKind.LOCKED or trio.current_time() >= give_up):
                    raise
                if full and not told:
                    told = True
                    log.error("the guest waits: %s", error)
                    await write_device_keys(store, self._device, {"tapfs/waiting": shown_error(error)})
            await trio.sleep(_FULL_PAUSE if full else _LOCKED_PAUSE)

    def _opened(self, settings: DiskSettings, plan_log: PlanLog) -> Image:
        """The image, with what a predecessor left for it unless others have changed it since that was given up."""
        path = settings.specification.path
        given_up = GivenUp(self._directory, self._device.key)
        standing = given_up.take(path)
        try:
            return open_disk(settings, plan_log)
        except ImageError as error:
            if standing is not None and error.kind in NEVER_OPENED:
                given_up.write(standing)
            raise

    async def _follow(self, store: XenStore, backend: Backend, answer: Answer) -> int:
        """Answer the guest and operators until the device is done."""
        service = self._service
        service.listen(self._directory, socket_name(self._device), answer)
        image = backend.disk.image
        log.info(
            "ready: %s (%s, %d bytes%s)%s",
            image.path,
            image.format_name,
            image.size,
            "" if image.writable else ", read-only",
            ", paused" if backend.disk.paused else "",
        )
        if self._device.made_by_libxl:
            service.start(DeviceModelDoor(backend, self._directory).serve, "serving a device model")
        where: dict[str, str | int] = {**device_model_keys(self._device, self._directory)}
        if self._xentop is not None:
            service.start(XentopFile(self._device, backend.disk, self._xentop).keep, "counting for xentop")
            where[PROCESS_KEY] = os.getpid()
        ready = {
            "tapfs/status": "ready",
            "tapfs/waiting": None,
            "tapfs/sandbox": confinement.description(),
        }
        await write_device_keys(store, self._device, {**where, **ready})
        self._event_loop = trio.lowlevel.current_trio_token()
        service.start(partial(self._note_waiting, backend), "noting what the guest waits for")
        # Not beside a swap: the flush of an image that serves no more would clear the plan of the one that does.
        service.flush_periodically(lambda: backend.disk.image, alone=backend.changing)
        await follow_device(self._host, backend, store)
        return EXIT_DONE

    def _tell_of_waiting(self) -> None:
        """In any thread: requests wait for space, or do so no more."""
        if self._event_loop is not None:
            with suppress(trio.RunFinishedError):
                self._event_loop.run_sync_soon(self._wake)

    def _wake(self) -> None:
        self._waiting_changed.set()

    async def _note_waiting(self, backend: Backend) -> None:
        while True:
            await self._waiting_changed.wait()
            self._waiting_changed = trio.Event()
            with suppress(ImageError):  # without xenstored `tapfs list` shows nothing at all
                await backend.note_waiting()

    async def _leave_waiting(self, disk: ServedDisk) -> None:
        """End at once, as far as requests wait for space: they would never be answered, or with an error."""
        if disk.held.reason is not None:
            with suppress(ImageError):
                await in_thread(disk.image.flush)
        disk.held.leave()

    def _remove_socket(self) -> None:
        with suppress(FileNotFoundError):
            (self._directory / socket_name(self._device)).unlink()


def main(arguments: list[str]) -> int:
    """Serve the device that the arguments name; the exit code."""
    match arguments:
        case [kind, *numbers] if len(numbers) == 3 and all(number.isdecimal() for number in numbers):
            device = Device(kind, *map(int, numbers))
        case _:
            print("tapfs: error: usage: disk_process KIND DOMAIN NUMBER OWN", file=sys.stderr)  # noqa: T201  no log yet
            return EXIT_USAGE
    log_to_stderr(str(device))
    try:
        return DiskProcess(device, find_host()).run()
    except ImageError as error:
        log.error("%s", error)
        return error.exit_code
    except Exception as error:  # noqa: BLE001  the supervisor starts another one, whatever it was
        log.error("internal error; please report", exc_info=error)
        return EXIT_BUG


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
