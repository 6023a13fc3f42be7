"""The images of a folder as volumes: listed, made, and opened as the regular files that their disks are.

An opened volume is a mount of `tapfs mount` that has lost its place. The descriptor alone keeps the mount; the process
that serves it flushes and ends when the last descriptor is closed.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

from tapfs.api.jobs import create
from tapfs.api.mounts import mount
from tapfs.disk.probe import format_named, own_format_names
from tapfs.driver import CreatableFormat
from tapfs.errors import ErrorKind, ImageError, from_os_error

#: Files with these endings are raw disks, whatever they begin with: a guest may write an image's header into one.
RAW_ENDINGS = (".raw", ".img")
_RAW = "raw"
#: The format of a new volume whose name has no format's ending.
_USUAL = "qcow2"
#: Formats whose disks lie in no folder, or that need a password.
_WITHOUT_A_FILE = ("ram", "luks")

_MNT_DETACH = 2


class Volume(NamedTuple):
    """A volume; `size` in bytes is None where the image does not say it, `used` is what it takes of the host."""

    name: str
    writable: bool
    size: int | None
    used: int | None


class Volumes:
    """The images that lie in a folder; their parents may lie below `backing_root`, the folder itself if it is None."""

    def __init__(self, folder: str, backing_root: str | None) -> None:
        self._folder = os.path.abspath(folder)
        self._backing_root = backing_root or self._folder

    def all(self) -> Iterator[Volume]:
        """All of them, by name. Images are looked at by a survey, in its sandbox; one that is broken has no size."""
        found = {name: _raw_volume(entry) for name, entry in self._files() if name.endswith(RAW_ENDINGS)}
        for row in self._surveyed():
            folder, name = os.path.split(str(row["path"]))
            if folder == self._folder and name not in found and is_name(name):
                used = row["allocated_size"]
                path = os.path.join(folder, name)
                found[name] = Volume(name, os.access(path, os.W_OK), row["virtual_size"], used)
        for name in sorted(found):
            yield found[name]

    def open(self, name: str, *, writable: bool) -> int:
        """A descriptor of the volume's disk. Raises ImageError."""
        path = self.path(name)
        if not os.path.isfile(path):
            raise ImageError(ErrorKind.NOT_FOUND, "no such volume", path=path, op="acquire")
        place = tempfile.mkdtemp(prefix="tapfs-volume-")
        try:
            known = _RAW if name.endswith(RAW_ENDINGS) else None
            mounted = mount(path, place, writable=writable, format=known, backing_root=self._backing_root)
            try:
                return os.open(mounted.disk, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
            except OSError as error:
                raise from_os_error(error, path=path, op="acquire") from error
            finally:
                _take_away(place)
        finally:
            with suppress(OSError):
                os.rmdir(place)

    def create(self, name: str, template: str | None, size: int) -> None:
        """A new volume. Raises ImageError."""
        if template is None:
            ending = name.rpartition(".")[2]
            template = _RAW if name.endswith(RAW_ENDINGS) else ending if ending in templates() else _USUAL
        create(self.path(name), template, size)

    def exists(self, name: str) -> bool:
        """Whether there is something of that name."""
        return os.path.lexists(self.path(name))

    def path(self, name: str) -> str:
        """The file of a volume."""
        return os.path.join(self._folder, name)

    def _files(self) -> Iterator[tuple[str, os.DirEntry[str]]]:
        try:
            with os.scandir(self._folder) as entries:
                yield from ((each.name, each) for each in entries if is_name(each.name) and each.is_file())
        except OSError as error:
            raise from_os_error(error, path=self._folder, op="list volumes") from error

    def _surveyed(self) -> Iterator[dict[str, Any]]:
        words = ("-P", "-m", "tapfs.cli", "survey", "--no-backing", "-q", "--to", "jsonl", "--", self._folder)
        done = subprocess.run([sys.executable, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False)
        for line in done.stdout.splitlines():
            row = json.loads(line)
            if "path" in row and "virtual_size" in row:
                yield row


def templates() -> list[str]:
    """The formats that a volume can be made in."""
    made = (name for name in own_format_names() if isinstance(format_named(name), CreatableFormat))
    return sorted(name for name in made if name not in _WITHOUT_A_FILE)


def is_name(name: str) -> bool:
    """Whether a name can be that of a volume: one component, not hidden."""
    return bool(name) and not name.startswith(".") and "/" not in name and "\0" not in name and len(name) < 256


def _raw_volume(entry: os.DirEntry[str]) -> Volume:
    status = entry.stat()
    return Volume(entry.name, os.access(entry.path, os.W_OK), status.st_size, status.st_blocks * 512)


def _take_away(place: str) -> None:
    """Take a mount's place away. Who has a file of it open keeps it."""
    if ctypes.CDLL(None).umount2(os.fsencode(place), _MNT_DETACH):
        helper = shutil.which("fusermount3") or "fusermount3"
        subprocess.run([helper, "-u", "-z", place], check=False, stdin=subprocess.DEVNULL)
