"""The records of disks that `tapfs serve` serves: what commands must know to show a disk and to ask its process.

A record is a file of JSON in the runtime directory, `served/PID-N.json`, beside the control socket of the disk. It is
valid as long as its process lives. Whoever meets the record of a dead process removes it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.records import dataclass
from tapfs.serving.listening import remove_left_socket
from tapfs.serving.processes import process_start
from tapfs.serving.runtime_directory import make_private, runtime_directories, runtime_directory, write_private


@dataclass(frozen=True, slots=True)
class ServedRecord:
    """One served disk.

    `number` tells the disks of a process apart. `door`: "nbd" or "vhost-user". `addresses`: how clients name it, of NBD
    as URIs, of vhost-user the path of the socket. `name`: of the export, or the serial number. `path`, `format`: the
    image that is served now. `mode`: "r" or "w". `process_start` is in clock ticks since boot.
    """

    pid: int
    process_start: int
    number: int
    door: str
    addresses: tuple[str, ...]
    name: str
    path: str
    format: str
    mode: str

    @property
    def alive(self) -> bool:
        """Whether the process that serves it still runs."""
        return process_start(self.pid) == self.process_start

    @property
    def address(self) -> str:
        """How clients name it first of all."""
        return self.addresses[0] if self.addresses else f"process {self.pid}, disk {self.number}"

    @property
    def socket_name(self) -> str:
        """The control socket, in the directory of the record."""
        return f"{self.pid}-{self.number}.socket"

    def is_named(self, text: str) -> bool:
        """Whether an operator means this disk: by an address, by the path of its socket, or by its image."""
        if text in self.addresses:
            return True
        path = os.path.realpath(text)
        sockets = [socket for socket in map(_path_of_socket, self.addresses) if socket is not None]
        return any(os.path.realpath(socket) == path for socket in sockets) or (
            "://" not in self.path and os.path.realpath(self.path) == path
        )


def own_directory() -> Path:
    """Where this process notes its disks, made if it is not there. Raises ImageError."""
    make_private(runtime_directory())
    directory = _below(runtime_directory())
    make_private(directory)
    return directory


def write_record(directory: Path, record: ServedRecord) -> None:
    """Have this record instead of the one before, whole or not at all. Raises ImageError."""
    path = _file(directory, record)
    new = path.with_suffix(".new")
    try:
        write_private(new, json.dumps(asdict(record)))
        new.replace(path)
    except OSError as error:
        raise from_os_error(error, path=str(path), op="note the served disk") from error


def remove_record(directory: Path, record: ServedRecord) -> None:
    """Remove a record and its control socket; nothing there is no error."""
    path = _file(directory, record)
    for each in (directory / record.socket_name, path.with_suffix(".new"), path):
        with suppress(OSError):
            each.unlink()


def records() -> list[tuple[Path, ServedRecord]]:
    """Those of this user's living processes, with their directories; what dead ones have left is removed."""
    found: list[tuple[Path, ServedRecord]] = []
    for directory in map(_below, runtime_directories()):
        for record in _read_all(directory):
            if record.alive:
                found.append((directory, record))
            else:
                _clear_away(directory, record)
    return sorted(found, key=lambda pair: (pair[1].process_start, pair[1].pid, pair[1].number))


def _clear_away(directory: Path, record: ServedRecord) -> None:
    """Remove what a killed server has left below the runtime directory.

    A socket elsewhere was named by its user, and stays until the next server listens there.
    """
    for place in map(_path_of_socket, record.addresses):
        if place is not None and Path(place).parent == directory.parent:
            remove_left_socket(place)
    remove_record(directory, record)


def _path_of_socket(address: str) -> str | None:
    place = unquote(address.partition("?socket=")[2], errors="surrogateescape") or address
    return place if place.startswith("/") else None


def find_record(text: str) -> tuple[Path, ServedRecord]:
    """The disk that an operator means. Raises ImageError(not_found), or invalid_argument if it may be several."""
    found = [pair for pair in records() if pair[1].is_named(text)]
    exact = [pair for pair in found if text in pair[1].addresses]
    found = exact or found
    if not found:
        raise ImageError(
            ErrorKind.NOT_FOUND,
            "no server of yours serves it",
            path=text,
            op="ask",
            remedy="'tapfs list' shows them all",
        )
    if len(found) > 1:
        addresses = ", ".join(record.address for _, record in found)
        raise ImageError(
            ErrorKind.INVALID_ARGUMENT, "may be several served disks", path=text, op="ask", remedy=f"say {addresses}"
        )
    return found[0]


def _below(directory: Path) -> Path:
    return directory / "served"


def _file(directory: Path, record: ServedRecord) -> Path:
    return directory / f"{record.pid}-{record.number}.json"


def _read_all(directory: Path) -> Iterator[ServedRecord]:
    names = {field.name for field in fields(ServedRecord)}
    for path in directory.glob("*.json"):
        try:
            data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            known: dict[str, Any] = {name: value for name, value in data.items() if name in names}
            known["addresses"] = tuple(data["addresses"])
            yield ServedRecord(**known)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue  # just removed, or not ours
