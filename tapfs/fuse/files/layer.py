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
import sys
from typing import Any

import trio

from tapfs.errors import ErrorKind, ImageError
from tapfs.fuse.files import mount_process
from tapfs.fuse.files.choice import FileSystemPlace
from tapfs.fuse.files.confined_program import ProgramRequest
from tapfs.fuse.files.file_systems import OWNERLESS_TYPES, READ_ONLY_TYPES, Program, program_for
from tapfs.fuse.files.running_program import RunningProgram, own_modules
from tapfs.fuse.handover import ShownFiles
from tapfs.fuse.mount_table import mounts_at, top_mount
from tapfs.fuse.settings import MountSettings
from tapfs.serving.messages import result_of

#: The end of what a process said that an error repeats, in bytes.
_SAID_BYTES = 500


class FilesLayer:
    """The file system at `place`, to be mounted on `mountpoint` from the tree mounted on `tree_directory`.

    `kept`: what is written is to be on the disk below when it is unmounted.
    """

    def __init__(
        self,
        place: FileSystemPlace,
        settings: MountSettings,
        mountpoint: str,
        tree_directory: str,
        *,
        writable: bool,
        kept: bool,
    ) -> None:
        self._place = place
        self._settings = settings
        self._mountpoint = mountpoint
        self._tree_directory = tree_directory
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
            self._program = RunningProgram.again(program, shown.program, image=self._place.image, node=self._node)

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
                request = mount_process.UnmountRequest(self._mountpoint, force=force, write_back=write_back)
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
                    await self._ask(mount_process.UnmountRequest(self._mountpoint, force=True, write_back=False))
            finally:
                if self._program is not None:
                    await self._program.put_away()

    # The two ways

    async def _attach(self) -> None:
        if self.type is None:
            self.type = await self._ask(mount_process.TypeRequest(self._node, confined=self._settings.confined))
        if self.type is None:
            said = f"there is no known file system on {self._place.where}"
            raise ImageError(ErrorKind.NOT_FOUND, self._place.with_remarks(said), path=self._place.image, op="mount")
        self._writable = self._writable and self.type not in READ_ONLY_TYPES
        options = self._owner_options(self.type)
        try:
            await self._attach_by_kernel(self.type, options)
        except ImageError as error:
            program = program_for(self.type)
            if program is None or error.kind not in (ErrorKind.UNSUPPORTED, ErrorKind.DENIED):
                raise
            await self._attach_by_program(program, options, why_not_by_kernel=error.message)

    async def _attach_by_kernel(self, type_name: str, options: list[str]) -> None:
        if os.geteuid() != 0:
            raise ImageError(
                ErrorKind.UNSUPPORTED,
                f"cannot mount {type_name}: only root has the kernel mount one",
                path=self._place.image,
                op="mount",
            )
        await self._ask(
            mount_process.MountRequest(
                self._place.image,
                self._place.remarks,
                os.path.join(self._tree_directory, "disk"),
                self._place.offset,
                self._place.size,
                type_name,
                self._mountpoint,
                writable=self._writable,
                flags=sorted(self._settings.flags),
                options=[*options, *self._settings.inner],
            )
        )

    async def _attach_by_program(self, program: Program, options: list[str], *, why_not_by_kernel: str) -> None:
        flags = self._settings.flags
        options = [*options, *(name for name in ("suid", "dev") if name in flags and os.geteuid() == 0)]
        options += [f"no{name}" for name in ("suid", "dev") if name not in flags]
        options += ["noexec"] if "noexec" in flags else []
        options += ["nonempty"] if "nonempty" in flags else []
        options += ["allow_other"] if self._settings.allow_other else []
        if program.lets_others_in and not self._settings.allow_other and self._settings.umask is None:
            options.append("umask=077")
        command = program.command(self._node, self._mountpoint, writable=self._writable, more=options)
        before = top_mount(self._mountpoint)
        request = ProgramRequest(
            command,
            self._node,
            self._mountpoint,
            writable=self._writable,
            flags=sorted(flags),
            allow_other=self._settings.allow_other,
        )
        self._program = await RunningProgram.start(
            program,
            request,
            image=self._place.image,
            why_not_by_kernel=why_not_by_kernel,
            confined=self._settings.confined,
        )
        await self._program.answers_at(self._mountpoint, before)

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
            await self._ask(mount_process.SettleRequest(self._mountpoint, self.device))

    def _is_covered(self) -> bool:
        return bool(self.device) and any(mount.device == self.device for mount in mounts_at(self._mountpoint))

    def _is_mounted(self) -> bool:
        mount = top_mount(self._mountpoint)
        return bool(self.device) and mount is not None and mount.device == self.device

    def _owner_options(self, type_name: str) -> list[str]:
        """Owner and modes where the file system has none of its own."""
        chosen = self._settings
        options = [f"{name}={value}" for name, value in (("uid", chosen.uid), ("gid", chosen.gid)) if value is not None]
        if chosen.umask is not None:
            options.append(f"umask={chosen.umask:03o}")
        if options and type_name not in OWNERLESS_TYPES:
            raise ImageError(
                ErrorKind.UNSUPPORTED,
                f"{type_name} has owners and modes of its own: {', '.join(options)} cannot change them",
                path=self._place.image,
                op="mount",
            )
        return options

    async def _ask(self, request: mount_process.Request) -> Any:
        """Have a process of its own do it; the result. Raises the ImageError that it met."""
        done = await trio.run_process(
            [sys.executable, "-m", mount_process.__name__],
            stdin=mount_process.words(request),
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            env=own_modules(),
        )
        answer = result_of(done.stdout)
        if answer is None:
            said = " ".join(done.stderr.decode(errors="backslashreplace").split())[-_SAID_BYTES:]
            raise ImageError(
                ErrorKind.IO,
                f"the mounting process failed ({done.returncode}): {said}",
                path=self._place.image,
                op="mount",
            )
        return answer["result"]
