"""The record of an attached block device: what its process, the next one and the commands must know of it.

A record is a file of JSON in the runtime directory, `ublk/N.json`, which a change replaces whole. So whatever is killed
when, a successor serves the disk either as it was or as it was to be.
"""

from __future__ import annotations

import json
import os
import secrets
from contextlib import suppress
from dataclasses import asdict, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.records import dataclass, replace
from tapfs.serving.processes import process_start
from tapfs.serving.runtime_directory import runtime_directory, write_private

#: Ends of the names of a device's files in the directory.
_SUFFIXES = (".json", ".socket", ".plan", ".plan-new", ".lock")


@dataclass(frozen=True, slots=True)
class DiskRecord:
    """A device and its disk.

    `path`, `format`: the image; `backing_formats`: of its parents, nearest first. `mode`: "r", "w" or "w!".
    `token` is of this life of the device. `process`, `keeper`: the process that serves it, and the one that starts
    another when that is killed, as `process_name` has them. `swap`: the file that is about to get the image's name and
    the formats below it (`tapfs.disk.leaf`). Limits are per second, 0 for none.
    """

    number: int
    path: str
    token: str
    format: str | None = None
    mode: str = "w"
    backing_formats: tuple[str, ...] = ()
    write_base: bool = False
    key_files: tuple[str, ...] = ()
    direct: bool = False
    cache_bytes: int | None = None
    wait_on: str = "space"
    paused: bool = False
    limit_bytes: int = 0
    limit_requests: int = 0
    swap: str = ""
    process: str = ""
    keeper: str = ""

    @property
    def pid(self) -> int | None:
        """The process that serves the disk now."""
        return living(self.process)

    @property
    def keeper_pid(self) -> int | None:
        """The process that looks after the one that serves."""
        return living(self.keeper)


def directory() -> Path:
    """Where the records are; it may not exist yet."""
    return runtime_directory() / "ublk"


def process_name(pid: int) -> str:
    """A process so that its number cannot mean another one later."""
    return f"{pid}:{process_start(pid) or 0}"


def living(name: str) -> int | None:
    """The pid of a `process_name` if that process runs."""
    pid, _, start = name.partition(":")
    return int(pid) if pid.isdecimal() and start.isdecimal() and process_start(int(pid)) == int(start) else None


def is_server(pid: int, number: int) -> bool:
    """Whether a process was started to serve a device. A record alone does not tell: the server may write it."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return (b"tapfs.ublk.process", str(number).encode()) in pairwise(words)


def is_keeper(pid: int, number: int) -> bool:
    """Whether a process has a child that was started to serve a device. Init is none: it gets every orphan."""
    servers = (int(name) for name in os.listdir("/proc") if name.isdecimal() and is_server(int(name), number))
    return pid != 1 and any(_parent(server) == pid for server in servers)


def _parent(pid: int) -> int | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[1])


def read_record(number: int) -> DiskRecord | None:
    """The record of a device; None: there is none, or it makes no sense. Raises ImageError(io, denied)."""
    path = directory() / f"{number}.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise from_os_error(error, path=str(path), op="read the record of the device") from error
    except ValueError:
        return None
    known = {field.name for field in fields(DiskRecord)}
    found = {name: value for name, value in found.items() if name in known}
    for name in ("backing_formats", "key_files"):
        found[name] = tuple(found.get(name, ()))
    try:
        return DiskRecord(**found)
    except TypeError:
        return None


def require_record(number: int) -> DiskRecord:
    """The record of a device. Raises ImageError(not_found) if tapfs has no such device."""
    record = read_record(number)
    if record is None:
        raise ImageError(
            ErrorKind.NOT_FOUND,
            f"tapfs has no block device /dev/ublkb{number}",
            op="look at the device",
            remedy="'tapfs list' shows them all",
        )
    return record


def write_record(record: DiskRecord) -> None:
    """Have this record instead of the one before. Raises ImageError."""
    path = directory() / f"{record.number}.json"
    new = path.with_suffix(".json-new")
    try:
        write_private(new, json.dumps(asdict(record)))
        new.replace(path)
    except OSError as error:
        raise from_os_error(error, path=str(path), op="write the record of the device") from error


def change_record(number: int, **changes: object) -> DiskRecord:
    """Change fields of a record; for the one process that may. Raises ImageError."""
    record = replace(require_record(number), **changes)  # type: ignore[arg-type]  # the names are fields
    write_record(record)
    return record


def records() -> list[DiskRecord]:
    """Those of all devices."""
    try:
        names = os.listdir(directory())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise from_os_error(error, path=str(directory()), op="list the devices") from error
    numbers = sorted(int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdecimal())
    found = (read_record(number) for number in numbers)
    return [record for record in found if record is not None]


def remove_files(number: int) -> None:
    """Remove what is left of a device; its record last, for whoever looks whether it is gone."""
    for suffix in reversed(_SUFFIXES):
        with suppress(OSError):
            (directory() / f"{number}{suffix}").unlink()


def keep_plan(number: int) -> Path | None:
    """Have the plan that a device's process has left outlive the device; its new place. None: there is no plan.

    Once that process has ended.
    """
    from tapfs.disk.plan_log import PlanLog  # most commands need none

    plan = directory() / f"{number}.plan"
    kept = plan.with_name(f"{number}-{secrets.token_hex(4)}.plan-kept")
    if not PlanLog(plan, "").holds_plan:
        return None
    try:
        plan.rename(kept)
    except OSError:
        return None
    return kept


def socket_name(number: int) -> str:
    """The control socket of a device's process in `directory`."""
    return f"{number}.socket"
