"""The reason for which a mount does not answer, told without a look at the mount itself: that would wait, too."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from tapfs.errors import ImageError
from tapfs.fuse.mount_table import top_mount
from tapfs.fuse.registry import MountEntry, registries
from tapfs.host.fuse_connection import FILE_SYSTEM_TYPE

#: States of a process in /proc that wait for a signal or a debugger.
_STOPPED = ("T", "t")


def real_place(path: str) -> str:
    """The real path of `path`; what is mounted there is not looked at, for its server may not answer."""
    folder, name = os.path.split(os.path.abspath(path))
    place = os.path.join(os.path.realpath(folder), name)
    return place if top_mount(place) is not None else os.path.realpath(path)


def is_stopped(entry: MountEntry) -> bool:
    """Whether the process that serves a mount has been stopped (SIGSTOP)."""
    with suppress(OSError, IndexError):
        after_name = Path(f"/proc/{entry.serving}/stat").read_bytes().rpartition(b") ")[2]
        return after_name[:1].decode("ascii", "replace") in _STOPPED
    return False


def how_to_go_on(entry: MountEntry) -> str:
    """The commands that help against a server that is stopped."""
    pid = entry.serving
    another = "and another one takes its place" if entry.server is not None else "which loses what was not flushed"
    return f"'kill -CONT {pid}' has it go on, 'kill -KILL {pid}' ends it, {another}"


def what_is_waited_for(path: str) -> str | None:
    """The words for a command that waits and was told `path`, a mount point or an image; None: nobody knows."""
    with suppress(ImageError, OSError):
        place = real_place(path)
        for registry in registries():
            for entry in registry.read_all():
                if entry.alive and place in (entry.mountpoint, entry.image, entry.source):
                    return _of_entry(entry)
        mount = top_mount(place)
        if mount is not None and mount.type.startswith("fuse"):
            whose = "" if mount.type == FILE_SYSTEM_TYPE else f" ({mount.type})"
            return f"{path}: waiting for the process that serves what is mounted there{whose}, which does not answer"
    return None


def _of_entry(entry: MountEntry) -> str:
    if is_stopped(entry):
        return f"{entry.mountpoint}: waiting for process {entry.serving}, which is stopped: {how_to_go_on(entry)}"
    return (
        f"{entry.mountpoint}: waiting for process {entry.serving} to write what is not written yet, and to unmount;"
        " Ctrl-C ends the waiting, and not that"
    )
