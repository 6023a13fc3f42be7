"""The mounts of a user: one JSON file and one control socket for each, in the runtime directory.

That is `$TAPFS_RUNTIME_DIR` if set; else `/run/tapfs` for root and `$XDG_RUNTIME_DIR/tapfs`
for an ordinary user, or `/tmp/tapfs-UID` where there is none. Only its owner may enter it.
An entry is as alive as its process; a process number used again is told by its start time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from tapfs.errors import ImageError, from_os_error
from tapfs.fuse.mount_table import FILE_SYSTEM_TYPE, top_mount, unmount
from tapfs.processes import process_start
from tapfs.runtime_directory import make_private, runtime_directory


@dataclass(frozen=True, slots=True)
class MountEntry:
    """One mount. `process_start` is in clock ticks since boot, `started` an ISO 8601 time.

    `shows` is "disk" or "files". In the second case `file_system` is their type, `partition` where
    they lie (None: the whole disk), and `device` (MAJOR:MINOR) tells their mount from others.
    """

    image: str
    format: str
    mountpoint: str
    pid: int
    process_start: int
    mode: str
    engine: str
    started: str
    shows: str = "disk"
    file_system: str | None = None
    partition: int | None = None
    device: str | None = None

    @property
    def alive(self) -> bool:
        """Whether the process that serves the mount still runs."""
        return process_start(self.pid) == self.process_start

    @property
    def mounted(self) -> bool:
        """Whether a file system of ours is at its mount point."""
        mount = top_mount(self.mountpoint)
        if mount is None:
            return False
        return mount.device == self.device if self.shows == "files" else mount.type == FILE_SYSTEM_TYPE


class Registry:
    """The runtime directory; made if it is not there. Raises ImageError(denied)."""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = runtime_directory() if directory is None else directory
        make_private(self.directory)

    def add(self, entry: MountEntry) -> None:
        """Write or replace the entry of a process, whole or not at all."""
        target = self._file(entry.pid)
        temporary = target.with_suffix(".new")
        try:
            temporary.write_text(json.dumps(asdict(entry)))
            temporary.replace(target)
        except OSError as error:
            raise from_os_error(error, path=str(target), op="note the mount") from error

    def remove(self, pid: int) -> None:
        """Remove what is there of a process's entry; nothing there is no error."""
        hidden = self.hidden_directory(pid)
        with suppress(ImageError, OSError):
            if top_mount(str(hidden)) is not None:
                unmount(str(hidden), lazy=True)
            hidden.rmdir()
        for path in (self._file(pid), self._file(pid).with_suffix(".new"), self.directory / self.socket_name(pid)):
            with suppress(OSError):
                path.unlink()

    def entries(self) -> list[MountEntry]:
        """All entries, oldest first; those of dead processes whose mount is gone too are removed."""
        found = sorted(self._read_all(), key=lambda entry: entry.started)
        served = {entry.mountpoint for entry in found if entry.alive}
        kept: list[MountEntry] = []
        for entry in found:
            if entry.alive or (entry.mountpoint not in served and entry.mounted):
                kept.append(entry)
            else:
                self.remove(entry.pid)
        return kept

    def find(self, mountpoint: str) -> MountEntry | None:
        """The entry for a (real) mount point: a living one, else a dead one."""
        here = [entry for entry in self._read_all() if entry.mountpoint == mountpoint]
        return max(here, key=lambda entry: (entry.alive, entry.started), default=None)

    @staticmethod
    def socket_name(pid: int) -> str:
        """The control socket of a process, relative to the directory."""
        return f"{pid}.socket"

    def hidden_directory(self, pid: int) -> Path:
        """Where a process mounts the disk that it shows only the files of."""
        return self.directory.resolve() / f"{pid}.disk"

    def _file(self, pid: int) -> Path:
        return self.directory / f"{pid}.json"

    def _read_all(self) -> Iterator[MountEntry]:
        names = {field.name for field in fields(MountEntry)}
        for path in self.directory.glob("*.json"):
            try:
                data = json.loads(path.read_text())
                yield MountEntry(**{name: value for name, value in data.items() if name in names})
            except (OSError, ValueError, TypeError, AttributeError):
                continue  # just removed, or not ours
