"""The life of a mount: mounted, serving, asked to end (or unmounted from outside), all put away.

A mount always ends in the same order: flush, unmount, close the image (which flushes the writes that came in
between), remove the registry entry, answer the command that asked. If `tapfs umount` asks, the mount stays when the
flush fails or when somebody uses the mount. A signal ends the mount all the same, and its users get errors. The parts
that every front end needs are in `tapfs.serving.service`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import trio

from tapfs.disk.image import Image
from tapfs.disk.plan_log import BEAT_SECONDS, PlanLog
from tapfs.errors import ErrorKind, ImageError
from tapfs.fuse import control, engines
from tapfs.fuse.engine_names import AUTO, PASSTHROUGH
from tapfs.fuse.files.layer import FilesLayer
from tapfs.fuse.handover import Handover, ServerEnd
from tapfs.fuse.mount_table import require_uncovered, top_mount
from tapfs.fuse.outside import Outside, options_of
from tapfs.fuse.registry import MountEntry, Registry
from tapfs.fuse.settings import PLAIN, MountSettings, for_hidden_mount
from tapfs.fuse.tree import KeptDisk, MadeFile, Tree
from tapfs.fuse.verified_reads import VerifiedReads
from tapfs.host.fuse_binding import pyfuse3
from tapfs.host.fuse_connection import FILE_SYSTEM_TYPE
from tapfs.kernel.metrics import as_data, together
from tapfs.records import dataclass, replace
from tapfs.serving.failures import failure_of
from tapfs.serving.log import log
from tapfs.serving.service import Service
from tapfs.serving.threads import in_thread, in_thread_alone

#: Tasks that read requests: those that stay, and the most there are at once.
_IDLE_TASKS, _MAX_TASKS = 4, 64

#: After a file system is unmounted Linux may keep its loop device busy for a moment, for example because udev reads it.
#: The unmount waits for the end of our own mount for this long, in seconds.
_RELEASE_SECONDS = 5


class Left(NamedTuple):
    """What a server that was killed has left: descriptors of the connection, and what it knew."""

    connections: Sequence[int]
    handover: Handover


@dataclass(frozen=True, slots=True)
class Mount:
    """What is to be mounted where; the session owns `image`, `verified`, `plan_log`, what is left, and closes them."""

    image: Image
    tree: Tree
    entry: MountEntry
    modified_ns: int
    #: What the faces of the disk have their identifiers from.
    seed: bytes
    engine: str = AUTO
    settings: MountSettings = PLAIN
    verified: VerifiedReads | None = None
    #: Who mounts, where this process may not, and mounts files; None: this process does, and shows none.
    outside: Outside | None = None
    #: The keeper of the mount, if it has one, and the plan log that a successor needs.
    keeper: ServerEnd | None = None
    plan_log: PlanLog | None = None
    #: The mount of a server that was killed: what it has left.
    left: Left | None = None


class Session:
    """One mount from init to the closed image. There can be one in a process.

    It is the front end of a service (`prepare`, `serve`, `end`), and what `tapfs umount` and `list` ask (`unmount`,
    `status`).
    """

    def __init__(self, mount: Mount, registry: Registry) -> None:
        self._mount = mount
        self._image = mount.image
        self._entry = mount.entry
        self._registry = registry
        files = mount.settings.files
        self._mountpoint = mount.entry.mountpoint
        self._settings = mount.settings
        if files is not None:
            if mount.outside is None:
                raise AssertionError("files are mounted by a process of their own")
            self._mountpoint = str(registry.hidden_directory(mount.entry.pid))
            self._settings = for_hidden_mount()
        source = self._entry.source or self._entry.image
        options = options_of(source, self._settings, writable=self._image.writable)
        self._outside = mount.outside or Outside(self._mountpoint, options)
        self._service = Service(self._mountpoint)
        self._files: FilesLayer | None = None
        self._attachment = engines.Attachment()
        self._device = ""
        self._ready: Callable[[], None] = lambda: None
        self._serving = False
        self._ending = trio.Lock()
        #: Set when we no longer look at our own mount, which keeps that busy.
        self._looked = trio.Event()
        self._counted: Mapping[str, object] = {}

    def run(self, ready: Callable[[], None]) -> None:
        """Mount, call `ready` once the mount answers, serve until it ends.

        Raises the first ImageError that mounting, flushing, unmounting or closing met.
        """
        self._ready = ready
        self._service.ending.add("remove the entry of the mount", self._remove_entry)
        if self._mount.verified is not None:
            self._service.ending.add("close the sidecar", self._mount.verified.close)
        if self._mount.plan_log is not None:
            self._service.ending.add("close the plan log", self._mount.plan_log.close)
        self._service.ending.add("flush and close the image", self._image.close)
        for node in self._mount.tree.nodes():
            if isinstance(node.content, KeptDisk):
                self._service.ending.add("close a snapshot", node.content.close)
            if isinstance(node.content, MadeFile):
                self._service.ending.add("close a face", node.content.close)
        self._service.run(self)

    # What the service asks for

    def prepare(self) -> None:
        """Mount."""
        settings = self._mount.settings
        if settings.files is not None:
            if self._mount.left is None:
                self._registry.add(self._entry)  # first, so that what a kill leaves is found
                self._outside.hide(self._entry.pid)
            self._files = FilesLayer(
                settings.files,
                self._outside,
                self._entry.mountpoint,
                self._mountpoint,
                writable=self._image.writable,
                kept=not self._image.temporary,
            )
            if self._mount.left is not None and self._mount.left.handover.files is not None:
                self._files.go_on(self._mount.left.handover.files)
            self._service.ending.add_async("unmount the files", self._files.put_away)
        self._attachment = self._attached()
        ending = self._service.ending
        # Nobody answers any more then: an unmount that could not be done before does not wait for us now.
        ending.add("unmount", self._unmount_lazily)
        if self._attachment.native is not None:
            ending.add("end the native threads", self._attachment.native.stop)
        ending.add_quick("end the session", partial(pyfuse3.close, unmount=False))
        ending.add("unmount", self._unmount_lazily)
        if self._mount.keeper is not None:
            ending.add_quick("have the keeper let go", self._mount.keeper.let_go)
        mount = top_mount(self._mountpoint)
        self._device = "" if mount is None else mount.device

    def _attached(self) -> engines.Attachment:
        """The mount, new or another server's."""
        mount = self._mount
        if mount.left is not None:
            return engines.take_over(
                self._image,
                mount.tree,
                self._mountpoint,
                *mount.left,
                settings=self._settings,
                verified=mount.verified,
            )
        return engines.attach(
            self._image,
            mount.tree,
            self._mountpoint,
            choice=mount.engine,
            outside=self._outside,
            modified_ns=mount.modified_ns,
            settings=self._settings,
            verified=mount.verified,
        )

    async def serve(self) -> None:
        """Start what belongs to a mount, and answer the kernel until the mount ends."""
        service = self._service
        self._registry.add(self._entry)
        service.listen(
            self._registry.directory, self._registry.socket_name(self._entry.pid), partial(control.answer, self)
        )
        service.flush_periodically(lambda: self._image)
        service.start(self._announce, "reach the new mount")
        if self._attachment.native is not None:
            service.start(self._watch_engine, "watch the native threads")
        if self._mount.plan_log is not None:
            service.start(partial(_beat, self._mount.plan_log), "say that the mount is served")
        self._serving = True
        try:
            await pyfuse3.main(min_tasks=_IDLE_TASKS, max_tasks=_MAX_TASKS)
        finally:
            # The image may be closed at any moment from here on.
            with suppress(ImageError):
                self._counted = self.status()
            self._serving = False

    async def end(self) -> None:
        """End for a signal: nothing keeps the mount."""
        async with self._ending:
            if not self._serving:
                return
            try:
                await self._leave(force=True)
            finally:
                self._stop_serving()

    # What `tapfs umount` and `list` ask for

    async def unmount(self, *, force: bool) -> ImageError | None:
        """Unmount and close the image; what went wrong all the same. Raises ImageError if the mount stays."""
        async with self._ending:
            if self._serving:
                try:
                    await self._leave(force=force)
                except Exception as error:
                    failure = failure_of(error, op="unmount", path=self._mountpoint)
                    log.error("%s: stays mounted: %s", self._mountpoint, failure)
                    raise failure from error
        await self._service.ended.wait()
        return self._service.failure

    def status(self) -> Mapping[str, object]:
        """What was counted; the engine does not see what the kernel passes through by itself."""
        if not self._serving:
            return self._counted
        if self._attachment.name == PASSTHROUGH:
            return {}
        counted = self._image.statistics()
        return {"bytes_read": counted.bytes_read, "bytes_written": counted.bytes_written}

    async def scrub(self, offset: int) -> Mapping[str, object]:
        """Read a part of the disk and compare it with the sidecar. The mount does not end meanwhile."""
        from tapfs.serving.scrubbing import scrub_step  # few disks are scrubbed

        async with self._ending:
            if not self._serving:
                raise ImageError(ErrorKind.LOCKED, "is ending", path=self._mountpoint, op="scrub")
            return await in_thread(partial(scrub_step, self._image, offset, self._entry.sidecar))

    def metrics(self) -> Mapping[str, object]:
        """What was asked for by kind, unless the kernel serves the disk itself, and what the engine has counted."""
        native, operations = self._attachment.native, self._attachment.operations
        asked: Mapping[str, object] = {}
        if operations is not None and self._attachment.name != PASSTHROUGH:
            here = operations.counted.metrics()
            asked = as_data(here if native is None else together(native.metrics(), here))
        return {**asked, "size": self._image.size, "statistics": self._image.statistics()._asdict()}

    # The tasks

    async def _announce(self) -> None:
        """See that the mount answers, tune it, and say so."""
        new = self._mount.left is None
        try:
            if new or self._files is None:  # else it is out of sight
                await in_thread_alone(self._outside.look)
                await self._service.worker.run(self._outside.read_ahead)
        finally:
            self._looked.set()
        if new:
            self._attachment.require(self._mount.engine, self._mountpoint)
        if self._files is None:
            self._give_to_keeper()
        # What there is to know of the engine is known only now.
        self._entry = replace(self._entry, engine=self._attachment.name)
        if self._files is not None:
            if new:
                await self._files.attach()
            self._entry = replace(self._entry, file_system=self._files.type, device=self._files.device)
        self._registry.add(self._entry)
        if self._files is not None:
            if new:
                # Only the file system above keeps our mount from now on; with it goes ours. Before its
                # device was noted, ours at its place is what the one above is known by after a kill.
                await self._service.worker.run(partial(self._outside.unmount, lazy=True))
            self._give_to_keeper()
        self._ready()

    def _give_to_keeper(self) -> None:
        """From now on a kill of this process is a pause, if the mount has a keeper and the kernel can go on."""
        keeper = self._mount.keeper
        if keeper is None:
            return
        shown = None if self._files is None else self._files.shown
        handover = self._attachment.handover(self._mount.tree, self._mount.seed, shown)
        if handover is not None:
            keeper.keep(handover, self._attachment.connections)

    async def _watch_engine(self) -> None:
        """With native threads it is they who learn of the unmounting."""
        if self._attachment.native is not None:
            await self._attachment.native.wait_ended()
            self._stop_serving()

    # The end

    async def _leave(self, *, force: bool) -> None:
        """Flush what is to be kept, unmount, and end the main loop. Raises if the mount stays."""
        if not force:
            device = self._device if self._files is None else self._files.device
            require_uncovered(self._entry.mountpoint, device)
        if not self._image.temporary:
            await self._flush(force=force)
        if self._files is not None:
            if not await self._files.detach(force=force):
                log.warning("%s is in use; its users get errors from now on", self._entry.mountpoint)
            elif not self._is_mounted():
                with trio.move_on_after(_RELEASE_SECONDS):
                    await self._service.ended.wait()
        if self._is_mounted():
            # A server that takes over is asked to unmount while it looks.
            with trio.move_on_after(_RELEASE_SECONDS):
                await self._looked.wait()
            try:
                await self._service.worker.run(self._outside.unmount)
            except ImageError as error:
                if not force or error.kind is not ErrorKind.LOCKED:
                    raise
                log.warning("%s; its users get errors from now on", error)
        self._stop_serving()

    async def _flush(self, *, force: bool) -> None:
        try:
            await self._service.worker.run(self._image.flush)
        except Exception as error:
            if not force:
                raise
            self._service.fail(failure_of(error, op="flush", path=self._mountpoint))

    def _stop_serving(self) -> None:
        # The loop may have ended by itself while we waited, and pyfuse3 has no session then.
        if self._serving:
            pyfuse3.terminate()

    def _unmount_lazily(self) -> None:
        if self._is_mounted():
            self._outside.unmount(lazy=True)

    def _remove_entry(self) -> None:
        """Files that could not be unmounted, because who could is gone, stay in the list: `tapfs umount` finds them."""
        left = None if self._files is None else self._registry.mount_of(self._entry)
        if left is None or left != top_mount(self._entry.mountpoint):
            self._registry.remove(self._entry.pid)

    def _is_mounted(self) -> bool:
        """Whether our file system, not another above it, is at the mount point."""
        mount = top_mount(self._mountpoint)
        if mount is None or not self._device:  # we could not look at once: nothing but ours is to be there
            return mount is not None and mount.type == FILE_SYSTEM_TYPE
        return mount.device == self._device


async def _beat(plan_log: PlanLog) -> None:
    while True:
        plan_log.beat()
        await trio.sleep(BEAT_SECONDS)
