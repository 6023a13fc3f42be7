"""Mounting from the command line: the checks that come first, and the process that serves.

The image is opened before the fork, so that its errors and password prompts belong to the
user's terminal and its locks to the child from the first moment.
"""

from __future__ import annotations

import os
import shutil
import signal
import stat
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib import import_module
from typing import TYPE_CHECKING, NoReturn

from tapfs.disk.json_text import json_text
from tapfs.errors import EXIT_BUG, ErrorKind, ImageError, from_os_error
from tapfs.fuse.mount_table import is_abandoned, top_mount
from tapfs.fuse.registry import MountEntry, Registry
from tapfs.fuse.settings import MountSettings
from tapfs.fuse.tree import image_tree
from tapfs.host.location import locate
from tapfs.serving.log import log, log_to_stderr, log_to_syslog
from tapfs.serving.messages import MESSAGE_LIMIT, decode, encode, error_from_data, error_to_data
from tapfs.serving.processes import process_start

if TYPE_CHECKING:
    from collections.abc import Callable
    from io import FileIO

    from tapfs.disk.image import Image
    from tapfs.partitions.table import DiskContents

_DEVICE = "/dev/fuse"


def require_fuse() -> None:
    """See that this machine and user can mount. Raises ImageError(unsupported, denied)."""
    try:
        import_module("pyfuse3")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError)
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            "mounting needs pyfuse3" + ("" if missing else f", which does not load: {error}"),
            op="mount",
            remedy='pip install "tapfs[fuse]", which needs: apt install fuse3 libfuse3-dev pkg-config gcc python3-dev',
        ) from error
    if not os.path.exists(_DEVICE):
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            "does not exist: the kernel offers no FUSE here",
            path=_DEVICE,
            op="mount",
            remedy="modprobe fuse, or start the container with --device /dev/fuse",
        )
    if not os.access(_DEVICE, os.R_OK | os.W_OK):
        raise ImageError(
            ErrorKind.DENIED,
            "you may not open it",
            path=_DEVICE,
            op="mount",
            remedy="have the administrator make its mode 0666",
        )
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        raise ImageError(
            ErrorKind.UNSUPPORTED, "mounting as an ordinary user needs fusermount3", remedy="apt install fuse3"
        )


def check_mount_point(path: str) -> str:
    """The real path of a directory that can be mounted on.

    Raises ImageError(not_found, invalid_argument, exists, locked).
    """
    try:
        if is_abandoned(path):
            raise ImageError(
                ErrorKind.LOCKED,
                "is a mount whose process died",
                path=path,
                op="mount",
                remedy=f"clean up with: tapfs umount {path}",
            )
        is_directory = stat.S_ISDIR(os.stat(path).st_mode)
    except ImageError:
        raise
    except OSError as error:
        raise from_os_error(error, path=path, op="use the mount point") from error
    except ValueError as error:
        raise ImageError(ErrorKind.NOT_FOUND, f"is no file name: {error}", path=repr(path), op="mount") from error
    if not is_directory:
        raise ImageError(
            ErrorKind.INVALID_ARGUMENT, "is not a directory; the mount point must be one", path=path, op="mount"
        )
    real = os.path.realpath(path)
    mount = top_mount(real)
    if mount is not None:
        raise ImageError(ErrorKind.EXISTS, f"is a mount point already ({mount.type})", path=path, op="mount")
    return real


def real_name(image: str) -> str:
    """The one name of an image, by which a mount of it is known again. Raises ImageError."""
    location = locate(image)
    return location.name if location.in_memory else os.path.realpath(location.host_path)


def is_mounted_so(
    registry: Registry, mountpoint: str, settings: MountSettings, *, files: bool, partition: int | None, writable: bool
) -> bool:
    """Whether the image is seen at the mount point already, and shows what it would show."""
    real = os.path.realpath(mountpoint)
    entry = registry.find(real)
    if entry is None or not entry.alive or (entry.source, entry.overlay) != (settings.source, settings.overlay):
        return False
    shown = registry.mount_of(entry)
    same_place = partition is None or (partition or None) == entry.partition
    return (
        shown is not None
        and shown == top_mount(real)
        and entry.shows == ("files" if files else "disk")
        and entry.mode == ("rw" if writable else "ro")
        and same_place
    )


def serve_in_foreground(
    image: Image, mountpoint: str, registry: Registry, engine: str, settings: MountSettings
) -> None:
    """Mount and serve here, by `engine` (see `tapfs.fuse.engines`), until the mount ends. Closes the image.

    Raises the ImageError that mounting, flushing or unmounting met.
    """
    log_to_stderr()
    _serve(image, mountpoint, registry, engine, settings, lambda: None)


def open_descriptors() -> frozenset[int]:
    """The descriptors that are open now, the standard streams aside."""
    listed = {int(name) for name in os.listdir("/proc/self/fd")}
    return frozenset(number for number in listed if number > 2 and os.path.exists(f"/proc/self/fd/{number}"))


def serve_in_background(
    image: Image,
    mountpoint: str,
    registry: Registry,
    engine: str,
    settings: MountSettings,
    inherited: frozenset[int],
) -> None:
    """Mount in a process of its own; return when the mount answers.

    The server lets go of the `inherited` descriptors: whoever started us may wait for their end.
    The child owns the image from then on; the caller must not use or close it. Raises the
    ImageError that the child met. No thread may have been started before.
    """
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(reader)
        for descriptor in inherited:
            os.close(descriptor)
        _serve_as_daemon(image, mountpoint, registry, engine, settings, os.fdopen(writer, "wb", buffering=0))
    os.close(writer)
    image.abandon()  # the child's copy of it has the same files and locks
    try:
        with os.fdopen(reader, "rb") as channel:
            message = decode(channel.readline(MESSAGE_LIMIT))
        if "ready" not in message:
            _, status = os.waitpid(child, 0)
            remedy = _clear_away_after(child, registry)
            if "error" in message:
                raise error_from_data(message["error"])
            code = os.waitstatus_to_exitcode(status)
            how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
            raise ImageError(
                ErrorKind.IO, f"the serving process ended early ({how})", path=mountpoint, op="mount", remedy=remedy
            )
        try:
            os.stat(mountpoint if settings.files else os.path.join(mountpoint, "disk"))
        except OSError as error:
            raise from_os_error(error, path=mountpoint, op="reach the new mount") from error
    except BaseException:
        # Interrupted while waiting: nothing may stay behind that nobody knows of.
        if process_start(child) is not None:
            os.kill(child, signal.SIGTERM)
            os.waitpid(child, 0)
        raise


def _clear_away_after(child: int, registry: Registry) -> str | None:
    """Take away what a server left if it was killed; the result says what to do where that fails."""
    from tapfs.fuse.unmounting import clean_up

    for entry in registry.entries():
        if entry.pid == child:
            try:
                clean_up(registry, entry)
            except ImageError as error:
                return f"part of it is left ({error.message}); clean up with: tapfs umount {entry.mountpoint}"
    return None


def _serve_as_daemon(
    image: Image, mountpoint: str, registry: Registry, engine: str, settings: MountSettings, parent: FileIO
) -> NoReturn:
    """The child: serve, and tell the parent by one message how the mounting went."""
    code = EXIT_BUG

    def tell(message: dict[str, object]) -> None:
        with suppress(OSError, ValueError):  # the parent is gone, or was told before
            parent.write(encode(message))
            parent.close()

    try:
        os.setsid()
        os.umask(0o077)
        void = os.open(os.devnull, os.O_RDWR)
        for descriptor in range(3):
            os.dup2(void, descriptor)
        os.close(void)
        log_to_syslog()
        _serve(image, mountpoint, registry, engine, settings, lambda: tell({"ready": True}))
        code = 0
    except ImageError as error:
        tell({"error": error_to_data(error)})
        code = error.exit_code
    except BaseException as error:  # noqa: BLE001  a forked process must not return into its parent's code
        log.error("internal error; please report", exc_info=error)
        bug = ImageError(ErrorKind.IO, f"internal error: {type(error).__name__}: {error}", path=mountpoint)
        tell({"error": error_to_data(bug)})
    finally:
        os._exit(code)


def _serve(
    image: Image,
    mountpoint: str,
    registry: Registry,
    engine: str,
    settings: MountSettings,
    ready: Callable[[], None],
) -> None:
    from tapfs.fuse.session import Mount, Session

    location = locate(image.path)
    name = location.name if location.in_memory else os.path.realpath(image.path)
    modified_ns = os.fstat(image.layers[0].file.descriptor).st_mtime_ns
    entry = MountEntry(
        image=name,
        format=image.format_name,
        mountpoint=mountpoint,
        pid=os.getpid(),
        process_start=process_start(os.getpid()) or 0,
        mode="rw" if image.writable else "ro",
        engine=engine,
        started=datetime.now(UTC).isoformat(timespec="milliseconds"),
        file_system=None if settings.files is None else settings.files.type,
        partition=None if settings.files is None else settings.files.partition,
        shows="disk" if settings.files is None else "files",
        source=settings.source,
        overlay=settings.overlay,
    )
    contents = image.contents(sector_size=settings.sector_size)
    tree = image_tree(
        image.size,
        writable=image.writable,
        information=lambda: information(image, contents),
        partitions=contents.table.partitions,
    )
    os.chdir("/")  # a working directory would keep its file system, or this mount, busy
    Session(Mount(image, tree, entry, modified_ns, engine, settings), registry).run(ready)


def information(image: Image, contents: DiskContents) -> bytes:
    """What `info.json` holds: what ``tapfs info --json`` prints, with the partitions that the tree has."""
    return (json_text(image.description(contents)) + "\n").encode()
