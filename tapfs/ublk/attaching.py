"""Attach an image as a block device, detach it, and find those that are attached: what the commands do."""

from __future__ import annotations

import errno
import os
import re
import secrets
import select
import signal
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.host.location import locate
from tapfs.kernel.ublk_server import Shape
from tapfs.records import dataclass, replace
from tapfs.serving.asking import ask_and_block
from tapfs.serving.background import open_descriptors, start_in_background
from tapfs.serving.runtime_directory import make_private, runtime_directory
from tapfs.ublk.driver import Driver, block_device
from tapfs.ublk.keeper import Keeper
from tapfs.ublk.record import (
    DiskRecord,
    directory,
    is_keeper,
    is_server,
    keep_plan,
    records,
    remove_files,
    require_record,
    socket_name,
    write_record,
)

#: Requests of a queue at once, and bytes of the longest. A request takes so much memory when it was that long once.
_DEPTH, _MAX_BYTES = 64, 512 << 10
_MOST_QUEUES = 4
#: Seconds that a device may take to go when it was stopped.
_GO_SECONDS = 60.0
#: Seconds in which a successor may follow a killed process. Linux 6.12 may take 30 s to let go of the device, and the
#: keeper may pause as long between two tries.
_SUCCESSOR_SECONDS = 90.0
#: Seconds that a process may take to end in order, and those that a killed one may take.
_END_SECONDS = 10.0
#: Seconds in which a keeper starts a process after another one, with some to spare.
_KEEPER_SECONDS = 40.0
_PAUSE_SECONDS = 0.02
_STATUS_SECONDS = 5.0

_NAME = re.compile(r"(?:/dev/)?(?:ublkb)?([0-9]{1,6})")


class UnservedError(ImageError):
    """A device without a process at the moment; a successor may come."""


def device_number(text: str) -> int:
    """The number in `/dev/ublkb3`, `ublkb3` or `3`. Raises ImageError(invalid_argument)."""
    found = _NAME.fullmatch(text)
    if found is None:
        raise ImageError(
            ErrorKind.INVALID_ARGUMENT, f"{text!r} is no ublk device", op="parse", remedy="say /dev/ublkbN"
        )
    return int(found[1])


def attach(disk: DiskRecord, *, queues: int | None) -> str:
    """Attach what a record without number, token and processes says; the block device. Raises ImageError.

    `queues`: None for one a processor, up to four.
    """
    inherited = open_descriptors()
    make_private(runtime_directory())
    make_private(directory())
    shape = Shape(queues or min(len(os.sched_getaffinity(0)), _MOST_QUEUES), _DEPTH, _MAX_BYTES)
    with Driver() as driver:
        number = driver.add(shape, zero_copy=True).number
        try:
            remove_files(number)  # of a device of that number that others have removed
            path = locate(disk.path).absolute().name
            write_record(replace(disk, number=number, path=path, token=secrets.token_hex(16)))
        except BaseException:
            driver.delete(number)
            raise
    start_in_background(Keeper(number, path, fresh=True), inherited)
    return block_device(number)


def resume(number: int) -> None:
    """Have a device go on that is paused or waits; one without a process gets one. Raises ImageError."""
    record = require_record(number)
    if record.pid is None and record.keeper_pid is None:
        start_in_background(Keeper(number, record.path, fresh=False), open_descriptors())
    ask(number, "resume")


def detach(number: int, *, force: bool) -> None:
    """Take the block device away: all that was written is in the image, and that is closed, when this returns.

    Raises ImageError: locked while it is mounted or otherwise used by the kernel, or its users wait for the host. If
    the image cannot be flushed, the device stays, too. With `force` users get errors instead and the device goes; an
    ImageError tells what could not be written.
    """
    # By this process, and not by the one that serves: who waits for a disk must not be the one that others wait for.
    record = require_record(number)
    unserved = record.pid is None and record.keeper_pid is None
    if unserved and not force:
        raise ImageError(
            ErrorKind.LOCKED,
            "nobody serves it, and what its users have written is not all in the image yet",
            path=block_device(number),
            op="detach",
            remedy=f"say tapfs resume --ublk {number} first",
        )
    with Driver() as driver:
        held, lost, plan = _hold(number, force=force), None, None
        try:
            if not unserved:
                lost = _settle_by_force(number, held) if force else _settle(number, held, force=False)
                if lost is not None and not force:
                    raise lost
                if isinstance(lost, UnservedError):
                    unserved = True
                    _end_processes(number)
            driver.stop(number)
            if unserved:
                plan = keep_plan(number)
                if lost is None and (held is not None or plan is not None):
                    lost = _unserved(number)
        finally:
            if held is not None:
                os.close(held)
        kept = "" if plan is None else f" (the metadata of it is kept in {plan})"
        loss = f"what was written last is lost{kept}: {lost}"
        try:
            _await_end(driver, number)
        except ImageError as error:
            if lost is None:
                raise
            raise ImageError(error.kind, f"{error.message}; {loss}", path=error.path, op=error.op) from lost
    if lost is not None:
        raise ImageError(lost.kind, f"is detached; {loss}", path=record.path, op="detach") from lost


def _settle(number: int, held: int | None, *, force: bool) -> ImageError | None:
    """Have all that users wrote in the image; what kept it from that. With `force` no user waits any more."""
    try:
        status = ask(number, "status")
        if status["paused"]:
            ask(number, "resume")
        if force:
            ask(number, "give_up")
        elif status["waiting"] is not None:
            return ImageError(
                ErrorKind.LOCKED,
                f"its users wait: {status['waiting']}",
                path=block_device(number),
                op="detach",
                remedy=f"mend that, then say tapfs resume --ublk {number}; or say --force, which loses what they write",
            )
        if held is not None:
            os.fsync(held)
        ask(number, "flush")
    except ImageError as error:
        return error
    except OSError as error:
        return from_os_error(error, path=block_device(number), op="write out what is dirty")
    return None


def _settle_by_force(number: int, held: int | None) -> ImageError | None:
    """The same with `force`. While nobody serves the device, a successor of its process is waited for."""
    give_up = time.monotonic() + _SUCCESSOR_SECONDS
    while True:
        failure = _settle(number, held, force=True)
        if not isinstance(failure, UnservedError) or time.monotonic() > give_up:
            return failure
        time.sleep(_PAUSE_SECONDS)


def _end_processes(number: int) -> None:
    """End the keeper of a device whose image nobody can open: it would try for ever, and in the end start it anew.

    The process that serves may just be writing what its predecessor had answered, so it is first asked to end.
    """
    record = require_record(number)
    keeper, server = record.keeper_pid, record.pid
    with suppress(ProcessLookupError):
        if keeper is not None:
            _end_keeper(number, keeper)
    with suppress(ProcessLookupError):
        if server is not None:
            _end_server(number, server)


def _end_keeper(number: int, pid: int) -> None:
    """Ask the keeper to end. It is known by its child, which it may be about to start. Raises ImageError."""
    give_up = time.monotonic() + _KEEPER_SECONDS
    with _held(pid) as process:
        while not is_keeper(pid, number):
            if _has_ended(process, 0):
                return
            if time.monotonic() > give_up:
                raise _foreign(number, pid)
            time.sleep(_PAUSE_SECONDS)
        signal.pidfd_send_signal(process, signal.SIGTERM)


def _end_server(number: int, pid: int) -> None:
    """End the process that serves: in order, or, if that takes too long, by SIGKILL. Raises ImageError."""
    with _held(pid) as process:
        if not is_server(pid, number):
            if _has_ended(process, 0):
                return
            raise _foreign(number, pid)
        for number_of_signal in (signal.SIGTERM, signal.SIGKILL):
            signal.pidfd_send_signal(process, number_of_signal)
            if _has_ended(process, _END_SECONDS):
                return


@contextmanager
def _held(pid: int) -> Generator[int]:
    """A pidfd: while it is open the number cannot mean another process. Raises ProcessLookupError."""
    process = os.pidfd_open(pid)
    try:
        yield process
    finally:
        os.close(process)


def _has_ended(process: int, seconds: float) -> bool:
    """Whether the process behind a pidfd ends within so many seconds."""
    return bool(select.select([process], [], [], seconds)[0])


def _foreign(number: int, pid: int) -> ImageError:
    return ImageError(
        ErrorKind.CORRUPT,
        f"its record names process {pid}, which does not serve it",
        path=block_device(number),
        op="detach",
        remedy=f"look at that process and at the record, {directory()}/{number}.json",
    )


def _hold(number: int, *, force: bool) -> int | None:
    """The block device, which nobody can mount from now on."""
    try:
        return os.open(block_device(number), os.O_RDONLY | os.O_CLOEXEC | (0 if force else os.O_EXCL))
    except FileNotFoundError:
        return None
    except OSError as error:
        failure = from_os_error(error, path=block_device(number), op="detach")
        if error.errno == errno.EBUSY:
            failure = ImageError(
                ErrorKind.LOCKED,
                "is in use: it is mounted, or a part of something else",
                path=block_device(number),
                op="detach",
                remedy="unmount it first, or say --force, which loses what is not written yet",
            )
        raise failure from error


def _await_end(driver: Driver, number: int) -> None:
    """Wait until the keeper has put the device away; without one do it here."""
    give_up = time.monotonic() + _GO_SECONDS
    while time.monotonic() < give_up:
        found = next((each for each in records() if each.number == number), None)
        if found is None:
            return
        if found.pid is None and found.keeper_pid is None:
            if driver.info(number) is not None:
                driver.delete(number)
            remove_files(number)
            return
        time.sleep(_PAUSE_SECONDS)
    raise ImageError(
        ErrorKind.LOCKED,
        "is stopped, and goes when those that have it open close it: they get errors now",
        path=block_device(number),
        op="detach",
    )


def ask(
    number: int, command: str, details: Mapping[str, object] | None = None, *, seconds: float | None = None
) -> dict[str, Any]:
    """Have the process of a device do a command (`tapfs.ublk.control`); its answer. Raises ImageError."""
    require_record(number)
    try:
        answer = ask_and_block(directory(), socket_name(number), command, seconds=seconds, **(details or {}))
    except ImageError:
        raise
    except (FileNotFoundError, ConnectionRefusedError) as error:
        failure = _unserved(number)
        failure.remedy = f"tapfs resume --ublk {number} starts one"
        raise failure from error
    except OSError as error:
        raise from_os_error(error, path=block_device(number), op="ask its process") from error
    if answer is None:
        message = "its process ended before it had answered"
        raise UnservedError(ErrorKind.IO, message, path=block_device(number), op="ask")
    return answer


def _unserved(number: int) -> UnservedError:
    return UnservedError(ErrorKind.NOT_FOUND, "no process serves it now", path=block_device(number), op="ask")


@dataclass(frozen=True, slots=True)
class AttachedDevice:
    """An attached block device as `tapfs list` and `stats` show it."""

    device: str
    path: str
    format: str | None
    mode: str
    #: In words: "ready", "paused", "waiting: …" (for the host), "has no process".
    summary: str
    pid: int | None
    size: int | None = None
    #: None: its process does not answer.
    statistics: dict[str, Any] | None = None
    #: As of a mount ("on", "off", what is missing); None: it does not answer.
    sandbox: str | None = None

    @property
    def place(self) -> tuple[str, str]:
        """Where it is, as a table shows it beside the disks of guests: no domain, and the device."""
        return "-", self.device.removeprefix("/dev/")


def attached_devices() -> list[AttachedDevice]:
    """All that this user has attached. Raises ImageError(denied, io)."""
    return [_look_at(record) for record in records()]


def look_at(number: int) -> AttachedDevice:
    """One of them. Raises ImageError(not_found)."""
    return _look_at(require_record(number))


def _look_at(record: DiskRecord) -> AttachedDevice:
    status: dict[str, Any] = {}
    statistics = None
    with suppress(ImageError):
        status = ask(record.number, "status", seconds=_STATUS_SECONDS)
        statistics = ask(record.number, "statistics", seconds=_STATUS_SECONDS)
    if not status:
        summary = "has no process: tapfs resume" if record.keeper_pid is None else "its process is starting"
    elif status["waiting"]:
        summary = f"waiting: {status['waiting']}"
    else:
        summary = "paused" if status["paused"] else "ready"
    return AttachedDevice(
        block_device(record.number),
        record.path,
        status.get("format", record.format),
        record.mode,
        summary,
        status.get("pid"),
        status.get("size"),
        statistics,
        status.get("sandbox"),
    )
