"""The life of a mount: mounted, serving, asked to end (or unmounted from outside), all put away.

However it ends, the order is the same: flush, unmount, close the image (which flushes what
came in between), remove the registry entry, answer whoever asked. A mount that is asked to
end by `tapfs umount` stays if the flush fails or somebody uses it; a signal ends it all the
same, and whoever still uses it gets errors.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pyfuse3
import trio

from tapfs.disk.image import Image
from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.fuse import control, engines
from tapfs.fuse.files.layer import FilesLayer
from tapfs.fuse.mount_table import require_uncovered, top_mount, unmount
from tapfs.fuse.registry import MountEntry, Registry
from tapfs.fuse.settings import PLAIN, MountSettings, for_hidden_mount
from tapfs.fuse.tree import Tree
from tapfs.serving.local_socket import listen
from tapfs.serving.log import log

#: A small program that looks at the paths it is given; no PATH is needed to find it.
_LOOK = (sys.executable, "-I", "-S", "-c", "import os, sys\nfor node in sys.argv[1:]: os.stat(node)")

_ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

#: Seconds between looks for metadata that nobody has flushed.
_FLUSH_SECONDS = 5

#: Tasks that read requests: those that stay, and the most there are at once.
_IDLE_TASKS, _MOST_TASKS = 4, 64

#: For how long the kernel may keep a disk whose file system has been unmounted (others look at loop devices, too).
_RELEASE_SECONDS = 5

#: For how long an answer may be on its way after the end.
_ANSWER_SECONDS = 2

#: What the kernel reads ahead, where we may say so: its largest request.
_READ_AHEAD_KIB = 1024


@dataclass(frozen=True, slots=True)
class Mount:
    """What is to be mounted where; the session owns `image` and closes it."""

    image: Image
    tree: Tree
    entry: MountEntry
    modified_ns: int
    engine: str = engines.AUTO
    settings: MountSettings = PLAIN


class Session:
    """One mount from init to the closed image. There can be one in a process."""

    def __init__(self, mount: Mount, registry: Registry) -> None:
        self._mount = mount
        self._image = mount.image
        self._entry = mount.entry
        self._mountpoint = mount.entry.mountpoint
        self._registry = registry
        self._files: FilesLayer | None = None
        if mount.settings.files is not None:
            self._mountpoint = str(registry.hidden_directory(mount.entry.pid))
            self._files = FilesLayer(
                mount.settings.files,
                mount.settings,
                mount.entry.mountpoint,
                self._mountpoint,
                writable=mount.image.writable,
            )
        self._attachment = engines.Attachment(None)
        self._device = ""
        self._serving = False
        self._failure: ImageError | None = None
        self._ending = trio.Lock()
        self._ended = trio.Event()
        self._watching = trio.CancelScope()

    def run(self, ready: Callable[[], None]) -> None:
        """Mount, call `ready` once the mount answers, serve until it ends.

        Raises the first ImageError that flushing, unmounting or closing met.
        """
        with _signals_held():
            try:
                self._attach()
            except BaseException:
                with suppress(ImageError):
                    self._image.close()
                self._registry.remove(self._entry.pid)
                raise
            trio.run(self._main, ready)
        if self._failure is not None:
            raise self._failure

    def _attach(self) -> None:
        """Mount."""
        if self._files is not None:
            self._registry.add(self._entry)  # first, so that what a kill leaves is found
            os.mkdir(self._mountpoint, 0o700)
        self._attachment = engines.attach(
            self._image,
            self._mount.tree,
            self._mountpoint,
            choice=self._mount.engine,
            source=self._entry.source or self._entry.image,
            modified_ns=self._mount.modified_ns,
            settings=self._mount.settings if self._files is None else for_hidden_mount(),
        )
        mount = top_mount(self._mountpoint)
        self._device = "" if mount is None else mount.device

    async def _main(self, ready: Callable[[], None]) -> None:
        async with trio.open_nursery() as conversations:
            async with trio.open_nursery() as services:
                try:
                    await self._serve(ready, services, conversations)
                finally:
                    self._serving = False
                    with trio.CancelScope(shield=True):
                        await self._put_away()
                services.cancel_scope.cancel()
            # Whoever asked us to end is still to be answered; who only keeps a connection open is not.
            conversations.cancel_scope.deadline = trio.current_time() + _ANSWER_SECONDS

    async def _serve(self, ready: Callable[[], None], services: trio.Nursery, conversations: trio.Nursery) -> None:
        """Start the services and answer the kernel until the mount ends."""
        try:
            self._registry.add(self._entry)
            listener = listen(self._registry.directory, self._registry.socket_name(self._entry.pid))
            answers = control.Answers(self._unmount_for_asker, self._status)
            services.start_soon(control.serve, listener, answers, conversations)
            await services.start(self._obey_signals)
            services.start_soon(self._flush_now_and_then)
            services.start_soon(self._announce, ready)
            services.start_soon(self._watch_engine)
            self._serving = True
            await pyfuse3.main(min_tasks=_IDLE_TASKS, max_tasks=_MOST_TASKS)
        except ImageError as error:
            self._fail(error)
        except OSError as error:
            self._fail(from_os_error(error, path=self._mountpoint, op="serve the mount"))
        except Exception as error:  # noqa: BLE001  whatever it is, the image must still be flushed
            log.error("internal error; please report", exc_info=error)
            self._fail(ImageError(ErrorKind.IO, "serving ended by an internal error", path=self._mountpoint))

    async def _announce(self, ready: Callable[[], None]) -> None:
        """See that the mount answers, tune it, and say so."""
        try:
            # In a process of its own: a thread of ours that waits for us would outlive a kill of us.
            nodes = [os.path.join(self._mountpoint, node) for node in ("disk", "info.json")]
            await trio.run_process([*_LOOK, *nodes], capture_stdout=True, capture_stderr=True)
            await trio.to_thread.run_sync(_set_read_ahead, self._device)
            self._attachment.require(self._mount.engine, self._mountpoint)
            # What there is to know of the engine is known only now.
            self._entry = replace(self._entry, engine=self._attachment.name)
            if self._files is not None:
                await self._files.attach()
                self._entry = replace(self._entry, file_system=self._files.type, device=self._files.device)
            self._registry.add(self._entry)
            if self._files is not None:
                # Only the file system above keeps our mount from now on; with it goes ours. Before its
                # device was noted, ours at its place is what the one above is known by after a kill.
                await trio.to_thread.run_sync(partial(unmount, self._mountpoint, lazy=True))
                os.rmdir(self._mountpoint)
            ready()
        except OSError as error:  # an ImageError as well
            self._fail(from_os_error(error, path=self._mountpoint, op="reach the new mount"))
            await self._end()
        except subprocess.CalledProcessError:
            self._fail(ImageError(ErrorKind.IO, "the new mount does not answer", path=self._mountpoint, op="mount"))
            await self._end()

    async def _watch_engine(self) -> None:
        """With native threads it is they who learn of the unmounting."""
        if self._attachment.native is not None:
            with self._watching:
                await self._attachment.native.wait_ended()
                self._stop_serving()

    async def _obey_signals(self, task_status: trio.TaskStatus[None]) -> None:
        """End on a signal; one that the process was started to ignore stays ignored."""
        heeded = [number for number in _ENDING_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        with trio.open_signal_receiver(*heeded) as received:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING_SIGNALS)
            task_status.started()
            async for number in received:
                log.info("%s: ending on %s", self._mountpoint, signal.Signals(number).name)
                await self._end()

    async def _flush_now_and_then(self) -> None:
        """Bound what a crash of the host can lose of a writer that never asks for a flush."""
        while self._image.writable:
            await trio.sleep(_FLUSH_SECONDS)
            if self._image.unflushed_bytes:
                try:
                    await trio.to_thread.run_sync(self._image.flush)
                except ImageError as error:
                    log.error("%s: flushing in the background: %s", self._mountpoint, error)

    async def _unmount_for_asker(self, force: bool) -> control.Answer:  # noqa: FBT001  a callback
        """What `tapfs umount` asks for."""
        async with self._ending:
            if self._serving:
                try:
                    await self._leave(force=force)
                except ImageError as error:
                    log.error("%s: stays mounted: %s", self._mountpoint, error)
                    return control.Answer(unmounted=False, error=error)
        await self._ended.wait()
        return control.Answer(unmounted=True, error=self._failure)

    def _status(self) -> dict[str, object]:
        """What `tapfs list` asks for; the engine does not see what the kernel passes through by itself."""
        if self._attachment.name == engines.PASSTHROUGH:
            return {}
        counted = self._image.statistics()
        return {"bytes_read": counted.bytes_read, "bytes_written": counted.bytes_written}

    async def _leave(self, *, force: bool) -> None:
        """Flush and unmount, and end the main loop. Raises ImageError if the mount stays."""
        if not force:
            device = self._device if self._files is None else self._files.device
            require_uncovered(self._entry.mountpoint, device)
        try:
            await trio.to_thread.run_sync(self._image.flush)
        except ImageError as error:
            if not force:
                raise
            self._fail(error)
        if self._files is not None:
            if not await self._files.detach(force=force):
                log.warning("%s is in use; its users get errors from now on", self._entry.mountpoint)
            elif not self._is_mounted():
                with trio.move_on_after(_RELEASE_SECONDS):
                    await self._ended.wait()
        if self._is_mounted():
            try:
                await trio.to_thread.run_sync(unmount, self._mountpoint)
            except ImageError as error:
                if not force or error.kind is not ErrorKind.LOCKED:
                    raise
                log.warning("%s; its users get errors from now on", error)
        self._stop_serving()

    async def _end(self) -> None:
        """End for a signal: nothing keeps the mount."""
        async with self._ending:
            if not self._serving:
                return
            try:
                await self._leave(force=True)
            except ImageError as error:
                self._fail(error)
                self._stop_serving()

    def _stop_serving(self) -> None:
        # The loop may have ended by itself while we waited, and pyfuse3 has no session then.
        if self._serving:
            pyfuse3.terminate()

    async def _put_away(self) -> None:
        """All that must happen however the mount ends."""
        try:
            if self._is_mounted():
                await trio.to_thread.run_sync(partial(unmount, self._mountpoint, lazy=True))
        except ImageError as error:
            self._fail(error)
        self._watching.cancel()
        pyfuse3.close(unmount=False)
        if self._attachment.native is not None:
            await trio.to_thread.run_sync(self._attachment.native.stop)
        try:
            if self._files is not None:
                await self._files.put_away()
        except ImageError as error:
            self._fail(error)
        try:
            await trio.to_thread.run_sync(self._image.close)
        except ImageError as error:
            self._fail(error)
        self._registry.remove(self._entry.pid)
        self._ended.set()

    def _is_mounted(self) -> bool:
        """Whether our file system, not another above it, is at the mount point."""
        mount = top_mount(self._mountpoint)
        return mount is not None and mount.device == self._device

    def _fail(self, error: ImageError) -> None:
        log.error("%s: %s", self._mountpoint, error)
        if self._failure is None:
            self._failure = error


def _set_read_ahead(device: str) -> None:
    """Have the kernel read ahead in large requests; it keeps its default where we may not say so."""
    with suppress(OSError):
        Path(f"/sys/class/bdi/{device}/read_ahead_kb").write_text(str(_READ_AHEAD_KIB))


@contextmanager
def _signals_held() -> Generator[None]:
    """Hold back the ending signals while nobody is there to obey them: the mount would stay."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
