"""The mounts of a user: one JSON file and one control socket for each, in the runtime directory.

`tapfs.serving.runtime_directory` says where that directory is. Only its owner may enter it. An entry is valid as long
as its process lives. The start time of the process tells a pid that was used again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path

from tapfs.errors import ImageError, from_os_error
from tapfs.fuse.mount_table import MountedFileSystem, mounts_at, top_mount, unmount
from tapfs.host.fuse_connection import FILE_SYSTEM_TYPE
from tapfs.records import dataclass
from tapfs.serving.processes import process_start
from tapfs.serving.runtime_directory import make_private, runtime_directories, runtime_directory, write_private


@dataclass(frozen=True, slots=True)
class MountEntry:
    """One mount. `process_start` is in clock ticks since boot, `started` an ISO 8601 time.

    `pid` is the process that lives as long as the mount, which names the entry. If that is a keeper
    (`tapfs.fuse.keeper`), `server` is the process that answers now, and `server_start` says when it started.

    `shows` is "disk" or "files". In the second case `file_system` is their type, `partition` where
    they lie (None: the whole disk), and `device` (MAJOR:MINOR) tells their mount from others; None
    while they are being mounted. `source` is the real name of the image that the user named, `overlay` that of
    the file that takes the writes, empty if it has none. `sidecar` proves each read, None: none does. `faces` are
    the formats, with commas between, as images of which the disk is shown, too.
    `sandbox`: "on", "off", or "on, without" what the kernel does not have.
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
    source: str = ""
    overlay: str | None = None
    sidecar: str | None = None
    faces: str = ""
    sandbox: str = "off"
    server: int | None = None
    server_start: int = 0

    @property
    def alive(self) -> bool:
        """Whether the process that serves the mount still runs, or its keeper, which starts another one."""
        return process_start(self.pid) == self.process_start or (self.server is not None and self.answers)

    @property
    def answers(self) -> bool:
        """Whether the process that serves the mount runs."""
        return process_start(self.serving) == (self.process_start if self.server is None else self.server_start)

    @property
    def serving(self) -> int:
        """The process that serves the mount."""
        return self.pid if self.server is None else self.server


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
            write_private(temporary, json.dumps(asdict(entry)))
            temporary.replace(target)
        except OSError as error:
            raise from_os_error(error, path=str(target), op="note the mount") from error

    def mount_of(self, entry: MountEntry) -> MountedFileSystem | None:
        """The file system of ours at the mount point of an entry, also below another.

        A process that is killed while it mounts files cannot note their device any more. Then
        its disk is still where it was mounted first, and the files are those that lie in it.
        """
        hidden = str(self.hidden_directory(entry.pid))
        for mount in reversed(mounts_at(entry.mountpoint)):
            if entry.shows != "files":
                ours = mount.type == FILE_SYSTEM_TYPE
            elif entry.device is not None:
                ours = mount.device == entry.device
            else:
                ours = mount.is_read_from(hidden)
            if ours:
                return mount
        return None

    def remove(self, pid: int) -> None:
        """Remove what is there of a process's entry; nothing there is no error."""
        self._remove(pid, lazy=True)

    def remove_unused(self, pid: int) -> bool:
        """The same for a dead process, unless somebody has its hidden disk open: the result is False then.

        A program that it had started may live, and finish the mounting of the files: the entry must stay.
        """
        return self._remove(pid, lazy=False)

    def _remove(self, pid: int, *, lazy: bool) -> bool:
        hidden = self.hidden_directory(pid)
        try:
            if top_mount(str(hidden)) is not None:
                unmount(str(hidden), lazy=lazy)
            with suppress(FileNotFoundError):
                hidden.rmdir()
        except (ImageError, OSError):
            if not lazy:
                return False
        file = self._file(pid)
        plan = self.plan_file(pid)
        for path in (
            *(file, file.with_suffix(".new"), self.directory / self.socket_name(pid)),
            *(plan, plan.with_suffix(".plan-new")),
        ):
            with suppress(OSError):
                path.unlink()
        return True

    def entries(self) -> list[MountEntry]:
        """All entries, oldest first; those of dead processes whose mount is gone too, for good, are removed."""
        found = sorted(self.read_all(), key=lambda entry: entry.started)
        served = {entry.mountpoint for entry in found if entry.alive}
        kept: list[MountEntry] = []
        for entry in found:
            mounted = entry.alive or (entry.mountpoint not in served and self.mount_of(entry) is not None)
            if mounted or not self.remove_unused(entry.pid):
                kept.append(entry)
        return kept

    def find(self, mountpoint: str) -> MountEntry | None:
        """The entry for a (real) mount point: a living one, else a dead one."""
        here = [entry for entry in self.read_all() if entry.mountpoint == mountpoint]
        return max(here, key=lambda entry: (entry.alive, entry.started), default=None)

    @staticmethod
    def socket_name(pid: int) -> str:
        """The control socket of a process, relative to the directory."""
        return f"{pid}.socket"

    def plan_file(self, pid: int) -> Path:
        """Where a mount keeps the plan of its next flush."""
        return self.directory / f"{pid}.plan"

    def hidden_directory(self, pid: int) -> Path:
        """Where a process mounts the disk that it shows only the files of."""
        return self.directory.resolve() / f"{pid}.disk"

    def _file(self, pid: int) -> Path:
        return self.directory / f"{pid}.json"

    def read_all(self) -> Iterator[MountEntry]:
        """What the entries say, in any order, also those of dead processes.

        A process may forge its own entry. One that is not that of the number in its name is left out: the number is
        part of the paths that are removed.
        """
        names = {field.name for field in fields(MountEntry)}
        for path in self.directory.glob("*.json"):
            try:
                data = json.loads(path.read_text())
                entry = MountEntry(**{name: value for name, value in data.items() if name in names})
            except (OSError, ValueError, TypeError, AttributeError):
                continue  # just removed, or not ours
            if type(entry.pid) is int and path == self._file(entry.pid):
                yield entry


def registries() -> list[Registry]:
    """This user's registries: the one for new mounts first, then those of processes with another environment."""
    return [Registry(directory) for directory in runtime_directories()]


def all_mounts() -> list[tuple[Registry, MountEntry]]:
    """All mounts of this user, oldest first, each with the registry that it stands in."""
    found = [(registry, entry) for registry in registries() for entry in registry.entries()]
    return sorted(found, key=lambda pair: pair[1].started)


def find_mount(mountpoint: str) -> tuple[Registry, MountEntry] | None:
    """The entry for a (real) mount point, a living one rather than a dead one, with its registry."""
    found = [(registry, registry.find(mountpoint)) for registry in registries()]
    here = [(registry, entry) for registry, entry in found if entry is not None]
    return max(here, key=lambda pair: (pair[1].alive, pair[1].started), default=None)
