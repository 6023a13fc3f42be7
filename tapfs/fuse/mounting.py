"""Mount from the command line: check what mounting needs, and start the process that serves the mount.

The image is opened before the fork (`tapfs.serving.background`). So errors and password prompts reach the user's
terminal, and the child has the image's locks from the first moment.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from contextlib import closing
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING

from tapfs.disk.json_text import json_text
from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.fuse.kept_disks import kept_disks
from tapfs.fuse.mount_table import is_abandoned, top_mount
from tapfs.fuse.registry import MountEntry, Registry, registries
from tapfs.fuse.settings import MountSettings
from tapfs.fuse.silence import how_to_go_on, is_stopped, real_place
from tapfs.fuse.tree import MadeFile, image_tree, partition_windows
from tapfs.host.location import locate
from tapfs.host.sandbox import confinement
from tapfs.records import dataclass
from tapfs.serving.log import log_to_stderr, tell_served
from tapfs.serving.processes import process_start

if TYPE_CHECKING:
    from collections.abc import Callable

    from tapfs.disk.image import Image
    from tapfs.fuse.handover import Kept, ServerEnd
    from tapfs.fuse.outside import Outside
    from tapfs.fuse.reopening import Reopening
    from tapfs.fuse.session import Left
    from tapfs.fuse.verified_reads import VerifiedReads
    from tapfs.jobs.face import Face
    from tapfs.partitions.table import DiskContents

_DEVICE = "/dev/fuse"
_SEED_BYTES = 16


def require_fuse() -> None:
    """See that this machine and user can mount. Raises ImageError(unsupported, denied)."""
    try:
        import_module("tapfs.host.fuse_binding")
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
        _require_unserved(path)
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


def _require_unserved(path: str) -> None:
    """Raise ImageError(exists) if a process serves a mount of ours there; the mount itself may not answer."""
    entry = next(filter(None, (registry.find(real_place(path)) for registry in registries())), None)
    mount = None if entry is None or not entry.alive else top_mount(entry.mountpoint)
    if entry is None or mount is None:
        return
    stopped = is_stopped(entry)
    state = ", which is stopped" if stopped else ""
    raise ImageError(
        ErrorKind.EXISTS,
        f"is a mount point already ({mount.type}), served by process {entry.serving}{state}",
        path=path,
        op="mount",
        remedy=how_to_go_on(entry) if stopped else f"name another directory, or say first: tapfs umount {path}",
    )


def real_name(image: str) -> str:
    """The one name of an image, by which a mount of it is known again. Raises ImageError."""
    return locate(image).resolved


def is_mounted_so(
    registry: Registry,
    mountpoint: str,
    settings: MountSettings,
    *,
    files: bool,
    partition: int | None,
    writable: bool,
    verified: bool = False,
) -> bool:
    """Whether the image is seen at the mount point already, and shows what it would show."""
    real = real_place(mountpoint)
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
        and (entry.sidecar is not None) == verified
        and entry.faces == ",".join(settings.faces)
        and same_place
    )


@dataclass(frozen=True, slots=True)
class ImageMount:
    """An open image that is to be mounted on `path`, by an engine (see `tapfs.fuse.engines`). Owns the image.

    Where its reads are `verified` its snapshots are not shown, for the sidecar is about one disk.
    """

    image: Image
    path: str
    registry: Registry
    engine: str
    settings: MountSettings
    verified: VerifiedReads | None = None
    outside: Outside | None = None
    #: How a server that follows a killed one opens the image; None: there is to be none.
    reopening: Reopening | None = None
    #: In the foreground, where a service manager may keep what the keeper holds.
    foreground: bool = False

    def serve(self, ready: Callable[[], None], kept: Kept | None = None) -> None:
        """Mount and serve until the mount ends; `ready` is called once it answers. Closes the image.

        With a keeper, if the mount can have one: then this returns in the process of a server, and the keeper's own
        process ends in here. `kept`: it is mounted already, and the image is closed. Raises the ImageError that
        mounting, flushing or unmounting met.
        """
        tell_served(image=real_name(self.image.path), disk=self.path)
        if self.reopening is None:
            self.serve_here(ready)
            return
        from tapfs.fuse.keeper import Keeper

        self.reopening.begin(self.registry.plan_file(os.getpid()))
        if kept is None:
            try:
                self.reopening.hold(self.image)
            except OSError as error:
                raise from_os_error(error, path=self.path, op="mount") from error
        Keeper(self, kept).run(ready)

    def serve_here(self, ready: Callable[[], None], end: ServerEnd | None = None) -> None:
        """Mount and serve in this process. Raises as `serve` does."""
        with closing(self.image) as image:
            self._serve(image, self.verified, ready, end, None)

    def note_kept(self, kept: Kept | None) -> None:
        """See `tapfs.fuse.keeper.Servable`."""
        if self.foreground:
            from tapfs.fuse.stored_mount import store

            if self.reopening is not None:
                store(kept, self.reopening.plan_log, self.reopening.options.scratch)

    def go_on(self, kept: Kept, ready: Callable[[], None], end: ServerEnd) -> None:
        """See `tapfs.fuse.keeper.Servable`."""
        from tapfs.fuse.handover import Handover
        from tapfs.fuse.session import Left

        if self.reopening is None:
            raise AssertionError("what cannot be opened again has no keeper")
        try:
            handover = Handover.unpacked(kept.message)
            image = self.reopening.again()
        except BaseException:
            kept.close()
            raise
        with closing(image):
            verified = None if self.verified is None else self.verified.of(image)
            self._serve(image, verified, ready, end, Left(kept.connections, handover))

    def _serve(
        self,
        image: Image,
        verified: VerifiedReads | None,
        ready: Callable[[], None],
        end: ServerEnd | None,
        left: Left | None,
    ) -> None:
        from tapfs.fuse.session import Mount, Session

        confinement.end_start()
        if left is None:
            modified_ns, seed = os.fstat(image.layers[0].file.descriptor).st_mtime_ns, os.urandom(_SEED_BYTES)
        else:
            modified_ns, seed = left.handover.modified_ns, left.handover.seed
        contents = image.contents(sector_size=self.settings.sector_size)
        tree = image_tree(
            image.size,
            writable=image.writable,
            information=lambda: information(image, contents),
            partitions=partition_windows(contents.table.partitions) if left is None else left.handover.partitions,
            faces=[
                (f"disk.{name}".encode(), MadeFile(partial(_face, name, image, verified, seed, modified_ns)))
                for name in self.settings.faces
            ],
            snapshots=() if verified else kept_disks(image, depth=0 if self.settings.overlay is None else 1),
        )
        mount = Mount(
            image,
            tree,
            self._entry(image, end),
            modified_ns,
            seed,
            self.engine,
            self.settings,
            verified,
            self.outside,
            keeper=end,
            plan_log=None if self.reopening is None or end is None else self.reopening.plan_log,
            left=left,
        )
        os.chdir("/")  # a working directory would keep its file system, or this mount, busy
        Session(mount, self.registry).run(ready)

    def _entry(self, image: Image, end: ServerEnd | None) -> MountEntry:
        files = self.settings.files
        process = os.getpid() if end is None else end.keeper
        return MountEntry(
            image=real_name(image.path),
            format=image.format_name,
            mountpoint=self.path,
            pid=process,
            process_start=process_start(process) or 0,
            server=None if end is None else os.getpid(),
            server_start=0 if end is None else process_start(os.getpid()) or 0,
            mode="rw" if image.writable else "ro",
            engine=self.engine,
            started=datetime.now(UTC).isoformat(timespec="milliseconds"),
            file_system=None if files is None else files.type,
            partition=None if files is None else files.partition,
            shows="disk" if files is None else "files",
            source=self.settings.source,
            sandbox=confinement.description(),
            overlay=self.settings.overlay,
            faces=",".join(self.settings.faces),
            sidecar=None if self.verified is None else os.path.realpath(self.verified.sidecar_path),
        )

    def let_go(self) -> None:
        """Let go of the image in the process that has forked: the child has the same files and locks."""
        self.image.abandon()

    def require_ready(self) -> None:
        """See that the mount can be reached from here, too."""
        try:
            os.stat(self.path if self.settings.files else os.path.join(self.path, "disk"))
        except OSError as error:
            if self.settings.files is not None and error.errno == errno.ENOTCONN:
                said = "its FUSE file system ended just after it had mounted; the system log has its words"
                raise ImageError(ErrorKind.IO, said, path=self.settings.files.image, op="mount") from error
            raise from_os_error(error, path=self.path, op="reach the new mount") from error

    def clear_away(self, child: int) -> str | None:
        """Take away what a server left if it was killed; the result says what to do where that fails."""
        from tapfs.fuse.outside import Outside, options_of

        here = Outside(self.path, options_of("", self.settings, writable=False), self.registry)
        try:
            (self.outside or here).clear_away(child)
        except ImageError as error:
            return f"part of it is left ({error.message}); clean up with: tapfs umount {self.path}"
        return None


def _face(name: str, image: Image, verified: VerifiedReads | None, seed: bytes, modified_ns: int) -> Face:
    from tapfs.jobs.face import Birth, made_face  # few mounts have faces

    return made_face(image, name, verified or image, Birth(seed, modified_ns // 1_000_000_000))


def serve_in_foreground(mount: ImageMount, kept: Kept | None = None) -> None:
    """The same until the mount ends, with the log on stderr. A service manager is told when it answers."""
    from tapfs.serving.service_manager import notify

    log_to_stderr()
    mount.serve(partial(notify, "READY=1"), kept)


def information(image: Image, contents: DiskContents) -> bytes:
    """What `info.json` holds: what ``tapfs info --json`` prints, with the partitions that the tree has."""
    return (json_text(image.description(contents)) + "\n").encode()
