"""The file system inside an image, mounted over the image's own mount: the upper of two layers.

The lower layer, the tree with `disk`, is mounted on a hidden directory. As soon as the upper layer is mounted, the
hidden mount is detached lazily. From then on only the user of the lower layer (a loop device, a FUSE file system) keeps
it mounted. When that user ends, the kernel ends the lower layer. So one unmounting ends both layers, and no kill of any
process leaves more than the mount that users see.

A kill before that moment leaves the hidden mount. The hidden mount stays as long as a program uses it that may still
finish the upper layer. An upper layer that was not noted in the registry is known by the hidden mount below it.
"""

from __future__ import annotations

import os
import socket

import trio

from tapfs.errors import ErrorKind, ImageError
from tapfs.fuse.files import mount_process, program_process
from tapfs.fuse.files.choice import FileSystemPlace
from tapfs.fuse.files.file_systems import READ_ONLY_TYPES, program_for
from tapfs.fuse.files.running_program import RunningProgram
from tapfs.fuse.handover import ShownFiles
from tapfs.fuse.mount_table import mounts_at, top_mount
from tapfs.fuse.outside import Outside, answer_of


class FilesLayer:
    """The file system at `place`, to be mounted on `mountpoint` from the tree mounted on `tree_directory`.

    All that a sandbox does not allow is done `outside` of it.

    `kept`: what is written is to be on the disk below when it is unmounted.
    """

    def __init__(
        self,
        place: FileSystemPlace,
        outside: Outside,
        mountpoint: str,
        tree_directory: str,
        *,
        writable: bool,
        kept: bool,
    ) -> None:
        self._place = place
        self._outside = outside
        self._mountpoint = mountpoint
        self._writable = writable
        self._kept = kept
        self._node = os.path.join(tree_directory, place.node)
        self._lock = trio.Lock()
        self._attaching = trio.CancelScope()
        self._program: RunningProgram | None = None
        self.type = place.type
        #: MAJOR:MINOR of the mount; empty while it is not there.
        self.device = ""

    async def attach(self) -> None:
        """Mount. Raises ImageError; `detach` and `put_away` interrupt it."""
        async with self._lock:
            before = top_mount(self._mountpoint)
            try:
                with self._attaching:
                    await self._attach()
            finally:
                mount = top_mount(self._mountpoint)
                if mount is not None and mount != before:
                    self.device = mount.device
            if self._attaching.cancelled_caught:
                raise ImageError(ErrorKind.IO, "mounting was interrupted", path=self._place.image, op="mount")

    def go_on(self, shown: ShownFiles) -> None:
        """They are mounted already, by a process that was killed."""
        self.type, self.device = shown.type, shown.device
        self._writable = self._writable and self.type not in READ_ONLY_TYPES
        program = None if self.type is None else program_for(self.type)
        if shown.program is not None and program is not None:
            self._program = RunningProgram.again(
                program, self._outside, shown.program, image=self._place.image, node=self._node
            )

    @property
    def shown(self) -> ShownFiles:
        """What the next process has to know if this one is killed; once they are mounted."""
        return ShownFiles(self.type, self.device, None if self._program is None else self._program.started)

    async def detach(self, *, force: bool) -> bool:
        """Write back and unmount, and wait until all of it is on the disk below.

        The result is False if with `force` it is only out of sight, still in use. Raises
        ImageError if it stays.
        """
        self._attaching.cancel()
        async with self._lock:
            gone = True
            if self._is_mounted():
                write_back = self._writable and self._kept and self._program is None
                request = mount_process.UnmountRequest(force=force, write_back=write_back)
                gone = bool(await self._ask(request))
            elif force and self._is_covered():
                await self._settle()
                return False
            if gone:
                await self._await_program()
            return gone

    async def put_away(self) -> None:
        """Whatever is left when nobody serves the disk any more: away with it."""
        self._attaching.cancel()
        async with self._lock:
            try:
                if self._is_mounted():
                    await self._ask(mount_process.UnmountRequest(force=True, write_back=False))
            finally:
                if self._program is not None:
                    await self._program.put_away()

    # The two ways

    async def _attach(self) -> None:
        if self.type is None:
            found = await self._ask(mount_process.TypeRequest(self._place.node))
            self.type = found if isinstance(found, str) else None
        if self.type is None:
            said = f"there is no known file system on {self._place.where}"
            raise ImageError(ErrorKind.NOT_FOUND, self._place.with_remarks(said), path=self._place.image, op="mount")
        self._writable = self._writable and self.type not in READ_ONLY_TYPES
        try:
            await self._attach_by_kernel(self.type)
        except ImageError as error:
            if program_for(self.type) is None or error.kind not in (ErrorKind.UNSUPPORTED, ErrorKind.DENIED):
                raise
            await self._attach_by_program(self.type, why_not_by_kernel=error.message)

    async def _attach_by_kernel(self, type_name: str) -> None:
        if os.geteuid() != 0:
            raise ImageError(
                ErrorKind.UNSUPPORTED,
                f"cannot mount {type_name}: only root has the kernel mount one",
                path=self._place.image,
                op="mount",
            )
        place = self._place
        await self._ask(mount_process.MountRequest(type_name, place.offset, place.size, place.remarks))

    async def _attach_by_program(self, type_name: str, *, why_not_by_kernel: str) -> None:
        program = program_for(type_name)
        if program is None:
            raise AssertionError("only a type that a program shows is shown by one")
        before = top_mount(self._mountpoint)
        message = {
            "request": program_process.START,
            "type": type_name,
            "node": self._place.node,
            "why_not_by_kernel": why_not_by_kernel,
        }
        self._program = RunningProgram.start(program, self._outside, message, image=self._place.image, node=self._node)
        look = mount_process.LookRequest()
        await self._program.answers_at(self._mountpoint, before, lambda: self._ask(look))

    async def _await_program(self) -> None:
        """Wait until the FUSE file system has written everything and ended."""
        if self._program is not None:
            await self._program.ended()

    # Helpers

    async def _settle(self) -> None:
        """Lose nothing of a file system that another mount covers, so that it cannot be unmounted."""
        if not (self._writable and self._kept):
            return
        if self._program is not None:
            await self._program.told_to_end()
        else:
            await self._ask(mount_process.SettleRequest(self.device))

    def _is_covered(self) -> bool:
        return bool(self.device) and any(mount.device == self.device for mount in mounts_at(self._mountpoint))

    def _is_mounted(self) -> bool:
        mount = top_mount(self._mountpoint)
        return bool(self.device) and mount is not None and mount.device == self.device

    async def _ask(self, request: mount_process.Request) -> object:
        """Have it done outside; the result. Raises the ImageError that was met there. Who is cancelled ends it."""
        with self._outside.begin(mount_process.message_of(request)) as answers:
            try:
                await trio.lowlevel.wait_readable(answers)
            except trio.Cancelled:
                answers.shutdown(socket.SHUT_WR)
                with trio.CancelScope(shield=True):
                    await trio.lowlevel.wait_readable(answers)
                raise
            return answer_of(answers).fields["result"]
