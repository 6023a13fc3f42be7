"""The process that serves one block device: ``python -m tapfs.ublk.process NUMBER READY``.

Its keeper (`tapfs.ublk.keeper`) starts it, and starts it anew after a kill. The first process of a device starts it; a
later one takes it over. The kernel then gives it every request that its predecessor had begun and not answered.
READY is a descriptor for one message: the device can be used, or why not.

The process ends with exit code 0 when the device is no more. On SIGTERM it answers and flushes all requests that it has
begun, leaves the device to the next process, and ends with 75.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from contextlib import suppress
from functools import partial

import trio

from tapfs.disk.image import Image
from tapfs.disk.live import SECTOR
from tapfs.disk.opening import complete_left, open_image
from tapfs.disk.password import given_password
from tapfs.disk.plan_log import PlanLog
from tapfs.errors import EXIT_BUG, EXIT_USAGE, ErrorKind, ImageError, from_os_error
from tapfs.records import replace
from tapfs.serving.disk_operations import RateLimit
from tapfs.serving.disk_sandbox import DiskNeeds, enter_for_disk
from tapfs.serving.failures import InternalError, reported
from tapfs.serving.held_requests import HeldRequests
from tapfs.serving.live_jobs import LiveJobs
from tapfs.serving.log import log, log_to_syslog, open_syslog
from tapfs.serving.messages import encode, failed, succeeded
from tapfs.serving.processes import EXIT_DONE, EXIT_STOPPED
from tapfs.serving.runtime_directory import make_private, runtime_directory
from tapfs.serving.service import Service
from tapfs.serving.threads import in_thread
from tapfs.ublk import control
from tapfs.ublk.driver import DeviceInfo, DiskShape, Driver, State, block_device, character_device
from tapfs.ublk.operations import Operations
from tapfs.ublk.record import DiskRecord, change_record, directory, process_name, require_record, socket_name
from tapfs.ublk.served_disk import ServedDisk
from tapfs.ublk.settings import open_options

#: Seconds that a dying predecessor may keep the image or the device. Linux 6.12 takes a device whose queue was full
#: from a killed process only after its time limit for requests, 30 s.
_PREDECESSOR_SECONDS = 90.0
_PAUSE_SECONDS = 0.05
#: Seconds that udev may take to give a device its name.
_NAME_SECONDS = 10.0
#: Seconds between two tries to open an image whose unflushed metadata finds no space.
_FULL_PAUSE = 1.0

#: Seconds that the end of a process waits for a pause, a swap, … that is under way.
_OPERATION_SECONDS = 10.0


class DiskProcess:
    """The life of one disk process: the front end of its service."""

    def __init__(self, number: int, ready: int) -> None:
        self._number = number
        self._ready = ready
        self._directory = directory()
        self._operations: Operations | None = None
        self._jobs: LiveJobs | None = None
        self._disk: ServedDisk | None = None
        self._done = False
        self._driver = Driver()
        self._service = Service(block_device(number), log_names_it=True)

    def run(self) -> int:
        """Serve the disk; the exit code."""
        try:
            self._service.run(self)
        except ImageError as failure:
            self._tell(failed(failure))
            if self._done:  # the device is no more, though its image could not be written to the end
                return EXIT_DONE
            return EXIT_BUG if isinstance(failure, InternalError) else failure.exit_code
        return EXIT_DONE if self._done else EXIT_STOPPED

    def prepare(self) -> None:
        """Open the image and have the device served: all that must be done before anybody can use it."""
        ending = self._service.ending
        self._lock()
        record = change_record(self._number, process=process_name(os.getpid()))
        info = self._driver.info(self._number)
        if info is None:
            raise ImageError(ErrorKind.NOT_FOUND, "is gone", path=block_device(self._number), op="serve")
        plan_log = PlanLog(self._directory / f"{self._number}.plan", record.token)
        ending.add("remove the control socket", self._remove_socket)
        ending.add("close the plan log", plan_log.close)
        served_before = info.state is not State.DEAD
        image = self._patiently(record, plan_log, served_before=served_before)
        disk = ServedDisk(
            image,
            limit=RateLimit(record.limit_bytes, record.limit_requests),
            paused=record.paused,
            held=HeldRequests(record.wait_on, lambda: None),
        )
        ending.add("flush and close the image", disk.close)
        self._connect(info, disk)
        self._disk = disk
        self._operations = Operations(disk, record, plan_log, self._driver)
        self._jobs = LiveJobs(self._operations, disk, plan_log, key_file=record.key_files)
        ending.add_async("wait for an operation", self._operations.changing.acquire)

    async def serve(self) -> None:
        """Answer users and operators until the device is no more."""
        if self._disk is None or self._operations is None or self._jobs is None:
            raise AssertionError("not prepared")
        disk, operations = self._disk, self._operations
        answer = partial(control.answer, operations, self._jobs)
        self._service.listen(self._directory, socket_name(self._number), answer)
        # Not beside a swap: the flush of an image that serves no more would clear the plan of the one that does.
        self._service.flush_periodically(lambda: disk.image, alone=operations.changing)
        log.info("ready: %s (%s, %d bytes)", disk.image.path, disk.image.format_name, disk.image.size)
        self._tell(succeeded({}))
        await trio.lowlevel.wait_readable(disk.ended_descriptor)
        if problem := disk.problem():
            raise from_os_error(
                OSError(problem, os.strerror(problem)), path=block_device(self._number), op="serve the device"
            )
        log.info("the device was stopped")
        self._done = True

    async def end(self) -> None:
        """End in order: an operation that is under way first, but not for long."""
        if self._operations is not None and self._disk is not None:
            if self._disk.held.reason is not None:
                with suppress(ImageError):
                    await in_thread(self._disk.image.flush)
            self._disk.held.leave()
            with trio.move_on_after(_OPERATION_SECONDS):
                async with self._operations.changing:
                    pass
        self._service.stop_serving()

    def _lock(self) -> None:
        """Be the only process of this device, as soon as the one before has ended."""
        path = self._directory / f"{self._number}.lock"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        give_up = time.monotonic() + _PREDECESSOR_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > give_up:
                    raise ImageError(
                        ErrorKind.LOCKED, "is served by another process", path=block_device(self._number), op="serve"
                    ) from None
                time.sleep(_PAUSE_SECONDS)
            else:
                return  # the descriptor stays open for as long as this process lives

    def _patiently(self, record: DiskRecord, plan_log: PlanLog, *, served_before: bool) -> Image:
        """The image; where users wait for it already, tried again while a predecessor dies or the host is full."""
        give_up = time.monotonic() + _PREDECESSOR_SECONDS
        while True:
            try:
                return _open(record, plan_log, served_before=served_before)
            except ImageError as error:
                full = error.kind is ErrorKind.NO_SPACE and record.wait_on != "nothing"
                locked = error.kind is ErrorKind.LOCKED and time.monotonic() < give_up
                if not served_before or not (full or locked):
                    raise
            time.sleep(_FULL_PAUSE if full else _PAUSE_SECONDS)

    def _connect(self, info: DeviceInfo, disk: ServedDisk) -> None:
        """Serve the queues, and have the kernel start the device or go on with it."""
        driver, number = self._driver, self._number
        recovered = info.state is not State.DEAD
        if recovered:
            driver.start_recovery(number, _PREDECESSOR_SECONDS)
        descriptor = _open_character_device(number)
        self._service.ending.add("close the character device", partial(os.close, descriptor))
        self._service.ending.add("let go of the queues", disk.disconnect)
        # A device that is not started yet must be served even if it is paused: its partitions are read.
        paused = recovered and disk.paused
        disk.connect(info.shape, device=descriptor, zero_copy=info.zero_copy, paused=paused)
        if recovered:
            driver.end_recovery(number)
            log.info("took over what the last process had not answered")
            return
        image = disk.image
        shape = DiskShape(image.size // SECTOR * SECTOR, image.writable, SECTOR, max(SECTOR, image.granule))
        driver.start(number, shape, info.shape)
        if disk.paused:
            disk.pause()

    def _tell(self, message: dict[str, object]) -> None:
        """Say once how it began."""
        if self._ready >= 0:
            with suppress(OSError):
                os.write(self._ready, encode(message))
                os.close(self._ready)
            self._ready = -1

    def _remove_socket(self) -> None:
        with suppress(FileNotFoundError):
            (self._directory / socket_name(self._number)).unlink()


def _open(record: DiskRecord, plan_log: PlanLog, *, served_before: bool) -> Image:
    """The image of a disk, first mended by the plan that a killed predecessor has left. Raises ImageError."""
    options = open_options(record, request_owner=plan_log.request_owner)
    if served_before:
        # An overlay that was made meanwhile is no reason to take the disk from those who use it.
        options = replace(options, write_base=True)
    if complete_left(record.path, options, plan_log):
        log.info("completed what the last process had acknowledged")
    image = open_image(record.path, options, password=given_password(record.key_files), plan_log=plan_log)
    if image.size < SECTOR:
        image.close()
        raise ImageError(ErrorKind.OUT_OF_BOUNDS, "is no disk: it has not one sector", path=image.path, op="open")
    return image


def _enter_sandbox(record: DiskRecord) -> None:
    """Give up what serving the device does not need."""
    open_syslog()
    device = character_device(record.number)
    give_up = time.monotonic() + _NAME_SECONDS
    while not os.path.exists(device) and time.monotonic() < give_up:  # udev may make its name a moment later
        time.sleep(_PAUSE_SECONDS)
    needs = DiskNeeds(makes=(str(directory()),), writes=(device,), key_files=record.key_files)
    enter_for_disk(record.path, open_options(record), needs)


def _open_character_device(number: int) -> int:
    """The device by which requests come; udev may make its name a moment later, and a predecessor still have it."""
    give_up = time.monotonic() + _PREDECESSOR_SECONDS
    while True:
        try:
            return os.open(character_device(number), os.O_RDWR | os.O_CLOEXEC)
        except (FileNotFoundError, OSError) as error:
            if time.monotonic() > give_up or not (isinstance(error, FileNotFoundError) or error.errno == 16):
                raise from_os_error(error, path=character_device(number), op="open the device") from error
        time.sleep(_PAUSE_SECONDS)


def main(arguments: list[str]) -> int:
    """Serve the device that the arguments name; the exit code."""
    match arguments:
        case [number, ready] if number.isdecimal() and ready.isdecimal():
            pass
        case _:
            print("tapfs: error: usage: process NUMBER READY", file=sys.stderr)  # noqa: T201  no log yet
            return EXIT_USAGE
    log_to_syslog()
    try:
        record = require_record(int(number))
        make_private(runtime_directory())
        make_private(directory())
        served = DiskProcess(int(number), int(ready))
        _enter_sandbox(record)
        return served.run()
    except Exception as error:  # noqa: BLE001  the keeper starts another one, whatever it was
        failure = reported(error, op="serve", path=block_device(int(number)))
        log.error("%s", failure)
        with suppress(OSError):
            os.write(int(ready), encode(failed(failure)))
        return failure.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
