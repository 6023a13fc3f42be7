"""The file system inside an image, mounted over the image's own mount: the upper of two layers.

The lower layer, the tree with `disk`, is mounted on a hidden directory. As soon as the upper one
stands, the hidden mount is taken out of sight: from then on only its user (a loop device, a FUSE
file system) keeps it, and when that ends, the kernel ends the lower layer. So one unmounting takes
down both, whoever does it, and no kill of any process leaves more than the mount that users see.
Before that, whatever else a kill leaves is found by the hidden mount: it stays while any program that
may still finish the upper one uses it, and it is what an upper one that nobody has noted lies on.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import trio

from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.fuse.files import loop_device, mount_process
from tapfs.fuse.files.choice import FileSystemPlace
from tapfs.fuse.files.file_systems import OWNERLESS_TYPES, READ_ONLY_TYPES, Program, program_for
from tapfs.fuse.mount_table import top_mount
from tapfs.fuse.settings import MountSettings
from tapfs.serving.log import log
from tapfs.serving.messages import decode, error_from_data

#: Between looks whether a FUSE file system has mounted itself.
_LOOK_SECONDS = 0.01

#: What a FUSE file system has for its end when nothing is waited for any more.
_GRACE_SECONDS = 5

#: The end of what a program said that an error repeats, in bytes.
_SAID_BYTES = 500


class FilesLayer:
    """The file system at `place`, to be mounted on `mountpoint` from the tree mounted on `tree_directory`."""

    def __init__(
        self, place: FileSystemPlace, settings: MountSettings, mountpoint: str, tree_directory: str, *, writable: bool
    ) -> None:
        self._place = place
        self._settings = settings
        self._mountpoint = mountpoint
        self._tree_directory = tree_directory
        self._writable = writable
        self._node = os.path.join(tree_directory, place.node)
        self._lock = trio.Lock()
        self._attaching = trio.CancelScope()
        self._program: trio.Process | None = None
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  open as long as the program may write
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
                raise ImageError(ErrorKind.IO, "mounting was interrupted", path=self._mountpoint, op="mount")

    async def detach(self, *, force: bool) -> bool:
        """Write back and unmount, and wait until all of it is on the disk below.

        The result is False if with `force` it is only out of sight, still in use. Raises
        ImageError if it stays.
        """
        self._attaching.cancel()
        async with self._lock:
            gone = True
            if self._is_mounted():
                gone = bool(
                    await self._ask(
                        mount_process.UnmountRequest(
                            self._mountpoint, force=force, write_back=self._writable and self._program is None
                        )
                    )
                )
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
                    with trio.move_on_after(_GRACE_SECONDS):
                        await self._program.wait()
                    with suppress(ProcessLookupError):
                        self._program.kill()
                    await self._program.wait()
                self._said.close()

    # The two ways

    async def _attach(self) -> None:
        if self.type is None:
            self.type = await self._ask(mount_process.TypeRequest(self._node))
        if self.type is None:
            partition = self._place.partition
            where = "the disk" if partition is None else f"partition {partition}"
            raise ImageError(
                ErrorKind.NOT_FOUND, f"there is no known file system on {where}", path=self._mountpoint, op="mount"
            )
        self._writable = self._writable and self.type not in READ_ONLY_TYPES
        options = self._owner_options(self.type)
        try:
            await self._attach_by_kernel(self.type, options)
        except ImageError as error:
            program = program_for(self.type)
            if program is None or error.kind not in (ErrorKind.UNSUPPORTED, ErrorKind.DENIED):
                raise
            await self._attach_by_program(program, options)

    async def _attach_by_kernel(self, type_name: str, options: list[str]) -> None:
        why_not = "only root has the kernel mount one" if os.geteuid() != 0 else ""
        if not loop_device.available():
            why_not = "there are no loop devices here"
        if why_not:
            raise ImageError(
                ErrorKind.UNSUPPORTED, f"cannot mount {type_name}: {why_not}", path=self._mountpoint, op="mount"
            )
        await self._ask(
            mount_process.MountRequest(
                os.path.join(self._tree_directory, "disk"),
                self._place.offset,
                self._place.size,
                type_name,
                self._mountpoint,
                writable=self._writable,
                flags=sorted(self._settings.flags),
                options=options,
            )
        )

    async def _attach_by_program(self, program: Program, options: list[str]) -> None:
        flags = self._settings.flags
        options = [*options, *(name for name in ("suid", "dev") if name in flags and os.geteuid() == 0)]
        options += [f"no{name}" for name in ("suid", "dev") if name not in flags]
        options += ["noexec"] if "noexec" in flags else []
        options += ["allow_other"] if self._settings.allow_other else []
        command = program.command(self._node, self._mountpoint, writable=self._writable, more=options)
        before = top_mount(self._mountpoint)
        try:
            self._program = await trio.lowlevel.open_process(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._said.fileno(),
                stderr=self._said.fileno(),
                start_new_session=True,
            )
        except FileNotFoundError:
            raise ImageError(
                ErrorKind.UNSUPPORTED,
                f"mounting {self.type} without the kernel's help needs {program.name}",
                path=self._mountpoint,
                op="mount",
                remedy=f"apt install {program.package}",
            ) from None
        except OSError as error:
            raise from_os_error(error, path=program.name, op="start") from error
        try:
            while top_mount(self._mountpoint) == before:
                if self._program.poll() is not None:
                    raise ImageError(
                        ErrorKind.IO,
                        f"{program.name} did not mount it: {self._words()}",
                        path=self._mountpoint,
                        op="mount",
                    )
                await trio.sleep(_LOOK_SECONDS)
        except trio.Cancelled:
            self._program.kill()
            raise

    async def _await_program(self) -> None:
        """Wait until the FUSE file system has written everything and ended."""
        if self._program is not None:
            code = await self._program.wait()
            if code != 0:
                log.error("%s: its FUSE file system ended with exit code %d: %s", self._mountpoint, code, self._words())

    # Helpers

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
                path=self._mountpoint,
                op="mount",
            )
        return options

    def _words(self) -> str:
        """The end of what the program said, on one line."""
        size = os.fstat(self._said.fileno()).st_size
        said = os.pread(self._said.fileno(), _SAID_BYTES, max(0, size - _SAID_BYTES))
        return " ".join(said.decode(errors="backslashreplace").split()) or "it did not say why"

    async def _ask(self, request: mount_process.Request) -> Any:
        """Have a process of its own do it; the result. Raises the ImageError that it met."""
        package = str(Path(mount_process.__file__).parents[3])
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        done = await trio.run_process(
            [sys.executable, "-m", mount_process.__name__],
            stdin=mount_process.words(request),
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )
        answer = decode(done.stdout)
        if "error" in answer:
            raise error_from_data(answer["error"])
        if "done" not in answer:
            said = " ".join(done.stderr.decode(errors="backslashreplace").split())[-_SAID_BYTES:]
            raise ImageError(
                ErrorKind.IO,
                f"the mounting process failed ({done.returncode}): {said}",
                path=self._mountpoint,
                op="mount",
            )
        return answer["done"]
