"""Unmount from the command line: ask the process that serves the mount, or clean up after a dead one."""

from __future__ import annotations

import os
import select
import time

from tapfs.errors import ErrorKind, ImageError
from tapfs.fuse import control
from tapfs.fuse.mount_table import (
    MountedFileSystem,
    holders,
    is_abandoned,
    require_uncovered,
    top_mount,
    unmount,
)
from tapfs.fuse.registry import MountEntry, Registry, all_mounts, find_mount
from tapfs.fuse.silence import real_place
from tapfs.host.fuse_connection import FILE_SYSTEM_TYPE
from tapfs.host.location import locate
from tapfs.serving.processes import process_start

#: For how long what a dead process has begun to mount may take to fail, or to be mounted after all; between looks.
_PATIENCE_SECONDS, _LOOK_SECONDS = 10, 0.05


def unmount_image(path: str, *, force: bool) -> str | None:
    """Unmount the image mounted at `path`, or named by it; wait until its process has closed it and ended.

    The result is a remark for the user, if there is one. Raises ImageError: what the flush
    or the closing met, locked if the mount is busy, not_found if there is none of ours,
    invalid_argument if an image is mounted at several places.
    """
    mountpoint = real_place(path)
    found = find_mount(mountpoint)
    if found is None and top_mount(mountpoint) is None:
        found = _mount_of_image(path)
        mountpoint = mountpoint if found is None else found[1].mountpoint
    registry, entry = (Registry(), None) if found is None else found
    if entry is not None and entry.alive and _ask(registry, entry, force=force):
        return None
    mount = top_mount(mountpoint)
    left = None if entry is None else registry.mount_of(entry)
    if entry is not None and (entry.shows == "files" or (left is not None and left != mount)):
        return clean_up(registry, entry)
    if mount is None or mount.type != FILE_SYSTEM_TYPE:
        registry.entries()  # drops what the dead left
        here = os.path.isdir(path) or not os.path.lexists(path)
        message = "no image is mounted here" if here else "is not mounted"
        raise ImageError(ErrorKind.NOT_FOUND, message, path=path, op="unmount")
    if is_abandoned(mountpoint):
        if entry is not None:
            return clean_up(registry, entry)
        unmount(mountpoint, lazy=True)
        return f"{mountpoint}: the process that served it had died; cleaned up"
    return _unmount_unlisted(mount, force=force)


def _mount_of_image(path: str) -> tuple[Registry, MountEntry] | None:
    """Where the image of this name is mounted, if it is."""
    try:
        location = locate(path)
    except ImageError:
        return None
    name = location.resolved
    found = [(registry, entry) for registry, entry in all_mounts() if name in (entry.image, entry.source)]
    if len(found) > 1:
        places = ", ".join(entry.mountpoint for _, entry in found)
        raise ImageError(
            ErrorKind.INVALID_ARGUMENT,
            f"is mounted at several places: {places}",
            path=path,
            op="unmount",
            remedy="name the one to unmount",
        )
    return found[0] if found else None


def _ask(registry: Registry, entry: MountEntry, *, force: bool) -> bool:
    """Have the process unmount and wait for its end; False if it died before it answered, and nobody follows it.

    Where the mount has a keeper the next server is asked then.
    """
    give_up = time.monotonic() + _PATIENCE_SECONDS
    while entry.alive:
        answered = _ask_process(registry, entry, force=force)
        if answered is not None:
            return answered
        if time.monotonic() > give_up:
            raise _silent(entry)
        time.sleep(_LOOK_SECONDS)
        entry = registry.find(entry.mountpoint) or entry
    return False


def _ask_process(registry: Registry, entry: MountEntry, *, force: bool) -> bool | None:
    """Have one process unmount, and wait for the end of all: False if it died; None: another one comes in its place."""
    try:
        process = os.pidfd_open(entry.pid if process_start(entry.pid) == entry.process_start else entry.serving)
    except ProcessLookupError:
        return False
    try:
        try:
            answer = control.ask_to_unmount(registry.directory, registry.socket_name(entry.pid), force=force)
        except ImageError:
            raise  # the mount stays
        except OSError as error:
            # A server that follows a killed one is in the list before it listens.
            begins = entry.server is not None and isinstance(error, ConnectionRefusedError | FileNotFoundError)
            if entry.answers and not begins:
                raise _silent(entry) from error
            answer = None
        if answer is None and entry.alive and entry.server is not None:
            return None
        if answer is None and not entry.alive:
            return False
        _wait_for_end(process)
        if answer is None:
            return False
        if answer.error is not None:
            raise answer.error
        return True
    finally:
        os.close(process)


def _silent(entry: MountEntry) -> ImageError:
    return ImageError(
        ErrorKind.LOCKED,
        f"process {entry.serving}, which serves the mount, does not answer",
        path=entry.mountpoint,
        op="unmount",
        remedy="try again; if it stays so, end it with kill",
    )


def _wait_for_end(process: int) -> None:
    """Wait until the process behind a pidfd has ended."""
    poll = select.poll()
    poll.register(process, select.POLLIN)
    poll.poll()


def clean_up(registry: Registry, entry: MountEntry) -> str:
    """Take away what the killed process of an entry left; the result says so.

    If it was killed while it mounted files, a program that it had started may still be at work: wait
    for that, too. Raises ImageError(locked); the entry stays then.
    """
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not _taken_away(registry, entry):
        if time.monotonic() >= deadline:
            by = ", ".join(holders(str(registry.hidden_directory(entry.pid)))) or "others"
            raise ImageError(
                ErrorKind.LOCKED,
                f"process {entry.pid}, which was mounting it, had died, but its disk is still used by {by}",
                path=entry.mountpoint,
                op="unmount",
                remedy="try again; if it stays so, end that use",
            )
        time.sleep(_LOOK_SECONDS)
    registry.entries()  # drops what others left before
    lost = "" if entry.mode == "ro" else "; what was not flushed is lost, check the image"
    return f"{entry.mountpoint}: process {entry.serving}, which served it, had died; cleaned up{lost}"


def _taken_away(registry: Registry, entry: MountEntry) -> bool:
    """Unmount and remove; False while that is too early."""
    mount = registry.mount_of(entry)
    if mount is None:
        return registry.remove_unused(entry.pid)
    require_uncovered(entry.mountpoint, mount.device)
    try:
        unmount(entry.mountpoint, lazy=True)
    except ImageError:
        if registry.mount_of(entry) is not None:  # else somebody else was faster
            raise
    registry.remove(entry.pid)  # who still uses the files keeps their disk, out of sight
    return True


def _unmount_unlisted(mount: MountedFileSystem, *, force: bool) -> str:
    """Unmount what lives but is in no registry of ours: of this user, or as root of any.

    The process of such a mount noted it in a directory that its TAPFS_RUNTIME_DIR named.
    """
    user = os.geteuid()
    if user not in (0, mount.user):
        raise ImageError(
            ErrorKind.DENIED,
            f"was mounted by another user ({mount.user})",
            path=mount.mount_point,
            op="unmount",
            remedy="let that user or root unmount it",
        )
    unmount(mount.mount_point, lazy=force)
    whose = f" for user {mount.user}" if mount.user != user else ""
    return f"{mount.mount_point}: unmounted{whose}; errors, if any, are in the system log"
