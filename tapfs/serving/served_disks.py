"""The disks that `tapfs serve` serves, as commands show them, and requests to the processes behind them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.records import dataclass
from tapfs.serving.asking import ask_and_block
from tapfs.serving.messages import error_from_data
from tapfs.serving.served_record import ServedRecord, find_record, records

#: Seconds for which a listing waits for a process that may be stopped or stuck.
_STATUS_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class ServedDisk:
    """A served disk as `tapfs list` and `stats` show it.

    `summary` in words: "ready", "paused", "waiting: …" (for the host), "does not answer". `clients` and what follows:
    None if it does not answer.
    """

    address: str
    addresses: tuple[str, ...]
    door: str
    name: str
    path: str
    format: str
    mode: str
    pid: int
    summary: str
    clients: int | None = None
    size: int | None = None
    statistics: dict[str, Any] | None = None
    #: As of a mount ("on", "off", what is missing); None: it does not answer.
    sandbox: str | None = None

    @property
    def place(self) -> tuple[str, str]:
        """Where it is, as a table shows it beside the disks of guests: no domain, and the address."""
        return "-", self.address


def served_disks() -> list[ServedDisk]:
    """All that this user's processes serve, the oldest first. Raises ImageError(denied, io)."""
    return [_look_at(directory, record) for directory, record in records()]


def look_at(text: str) -> ServedDisk:
    """One of them. Raises ImageError(not_found, invalid_argument)."""
    return _look_at(*find_record(text))


def ask(text: str, command: str, **details: Any) -> dict[str, Any]:
    """Have the process of a served disk do a command (`tapfs.serving.served_control`). Raises ImageError."""
    directory, record = find_record(text)
    return _ask(directory, record, command, **details)


def stop(text: str, *, force: bool) -> None:
    """End the server of a disk, and with it the other disks of that server. All is closed when this returns.

    Raises ImageError: locked while it is used, unless `force`, and what the flush or the end has met.
    """
    directory, record = find_record(text)
    error = _ask(directory, record, "stop", force=force)["error"]
    if error is not None:
        raise error_from_data(error)


def _ask(
    directory: Path, record: ServedRecord, command: str, *, seconds: float | None = None, **details: Any
) -> dict[str, Any]:
    try:
        answer = ask_and_block(directory, record.socket_name, command, seconds=seconds, **details)
    except ImageError:
        raise
    except OSError as error:
        raise from_os_error(error, path=record.address, op="ask its server") from error
    if answer is None:
        raise ImageError(
            ErrorKind.IO, "its server ended before it had answered", path=record.address, op="ask its server"
        )
    return answer


def _summary(status: Mapping[str, Any]) -> str:
    if not status:
        return "does not answer"
    if status["waiting"]:
        return f"waiting: {status['waiting']}"
    return "paused" if status["paused"] else "ready"


def _look_at(directory: Path, record: ServedRecord) -> ServedDisk:
    status: dict[str, Any] = {}
    statistics = None
    with suppress(ImageError):
        status = _ask(directory, record, "status", seconds=_STATUS_SECONDS)
        statistics = _ask(directory, record, "statistics", seconds=_STATUS_SECONDS)
    return ServedDisk(
        record.address,
        record.addresses,
        record.door,
        record.name,
        record.path,
        record.format,
        record.mode,
        record.pid,
        _summary(status),
        status.get("clients"),
        status.get("size"),
        statistics,
        status.get("sandbox"),
    )
