"""A FUSE program at work: start it, wait until its mount answers, and say why if it does not."""

from __future__ import annotations

import errno
import os
import select
import shutil
import signal
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO, Protocol, Self

import trio

from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.fuse.files import confined_program
from tapfs.fuse.files.confined_program import ProgramRequest
from tapfs.fuse.files.file_systems import Program
from tapfs.fuse.mount_table import MountedFileSystem, top_mount
from tapfs.fuse.settings import FUSE_CONFIGURATION, users_may_allow_others
from tapfs.records import replace
from tapfs.serving.log import log
from tapfs.serving.processes import process_start

#: Between looks whether a program has mounted itself.
_LOOK_SECONDS = 0.01

#: Seconds that a program has for its end when its mount is gone.
_GRACE_SECONDS = 5

#: Seconds that a program has to write back all that it holds.
_WRITE_BACK_SECONDS = 60

#: Bytes of a program's output that an error repeats, of its start and of its end: many tell the cause
#: first and print their usage then, others the other way round.
_HEAD_BYTES, _TAIL_BYTES = 400, 200

#: A process of its own looks: a thread of ours that waits for a mount of ours would outlive a kill of us.
_LOOK = (sys.executable, "-I", "-S", "-c", "import os, sys\nos.statvfs(sys.argv[1])")


class _Process(Protocol):
    """What there is to know of the process of a program, and to do with it; see trio.Process."""

    @property
    def pid(self) -> int: ...

    @property
    def returncode(self) -> int | None: ...

    def poll(self) -> int | None: ...

    def kill(self) -> None: ...

    def terminate(self) -> None: ...

    async def wait(self) -> int: ...


class _Followed:
    """The process of a program that another process has started; how it ended is not to be known."""

    def __init__(self, pid: int, start: int) -> None:
        self.pid = pid
        self._descriptor: int | None = None
        with suppress(OSError):
            self._descriptor = os.pidfd_open(pid)
        if process_start(pid) != start:
            self.close()

    @property
    def returncode(self) -> int | None:
        return None if self._descriptor is not None else 0

    def poll(self) -> int | None:
        if self._descriptor is not None and select.select([self._descriptor], [], [], 0)[0]:
            self.close()
        return self.returncode

    def kill(self) -> None:
        if self._descriptor is not None:
            signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)

    def terminate(self) -> None:
        if self._descriptor is not None:
            signal.pidfd_send_signal(self._descriptor, signal.SIGTERM)

    async def wait(self) -> int:
        if self._descriptor is not None:
            await trio.lowlevel.wait_readable(self._descriptor)
            self.close()
        return 0

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


class RunningProgram:
    """The process of `program`, which mounts the file system of an image (named `image` in errors)."""

    def __init__(self, program: Program, image: str, node: str, process: _Process, said: IO[bytes]) -> None:
        """Take over a process and the file that it writes its messages to. Use `start`."""
        self._program = program
        self._image = image
        self._node = node
        self._process = process
        self._said = said

    @classmethod
    async def start(
        cls, program: Program, request: ProgramRequest, *, image: str, why_not_by_kernel: str, confined: bool
    ) -> Self:
        """Start it, `confined` in a sandbox (`tapfs.fuse.files.confined_program`).

        Raises ImageError(unsupported) if it is not installed, (denied) if it could not read the disk.
        """
        found = shutil.which(program.name)
        if found is None:
            raise ImageError(
                ErrorKind.UNSUPPORTED,
                f"{why_not_by_kernel}, and without the kernel it needs {program.name}",
                path=image,
                op="mount",
                remedy=f"apt install {program.package}",
            )
        if not confined:
            _require_reach(found, image)
        command = [found, *request.command[1:]]
        # In memory, for a folder for temporary files may be missing; open as long as the program may write.
        said: IO[bytes] = os.fdopen(os.memfd_create("said"), "r+b")
        try:
            process = await trio.lowlevel.open_process(
                [sys.executable, "-m", confined_program.__name__] if confined else command,
                stdin=subprocess.PIPE if confined else subprocess.DEVNULL,
                stdout=said.fileno(),
                stderr=said.fileno(),
                start_new_session=True,
                env=own_modules(),
            )
            if process.stdin is not None:
                async with process.stdin:
                    await process.stdin.send_all(replace(request, command=command).packed())
        except (OSError, trio.BrokenResourceError) as error:
            said.close()
            met = error if isinstance(error, OSError) else OSError(errno.EPIPE, "")
            raise from_os_error(met, path=program.name, op="start") from error
        return cls(program, image, request.node, process, said)

    @classmethod
    def again(cls, program: Program, started: tuple[int, int], *, image: str, node: str) -> Self:
        """The one that another process has started, by its number and the time of its start."""
        process = _Followed(*started)
        said: IO[bytes]
        try:
            said = open(f"/proc/{process.pid}/fd/1", "rb", buffering=0)  # noqa: SIM115  closed by `put_away`
        except OSError:
            said = os.fdopen(os.memfd_create("said"), "r+b")
        return cls(program, image, node, process, said)

    @property
    def started(self) -> tuple[int, int]:
        """What another process knows it by."""
        return self._process.pid, process_start(self._process.pid) or 0

    async def answers_at(self, mountpoint: str, before: MountedFileSystem | None) -> None:
        """Wait until its mount, not that which was there `before`, answers. Raises ImageError."""
        process = self._process
        try:
            while top_mount(mountpoint) == before:
                if process.poll() is not None:
                    raise self._failed("did not mount it")
                await trio.sleep(_LOOK_SECONDS)
            look = await trio.run_process([*_LOOK, mountpoint], capture_stdout=True, capture_stderr=True, check=False)
            if look.returncode != 0:
                with trio.move_on_after(_GRACE_SECONDS):
                    await process.wait()
                raise self._failed("mounted it, but does not answer")
        except trio.Cancelled:
            process.kill()
            raise

    async def ended(self) -> None:
        """Wait until it has written everything and ended."""
        await self._process.wait()

    async def told_to_end(self) -> None:
        """Have it write everything back and end, though its mount cannot be taken away; wait for that."""
        with suppress(ProcessLookupError, PermissionError):
            self._process.terminate()
        with trio.move_on_after(_WRITE_BACK_SECONDS):
            await self._process.wait()

    async def put_away(self) -> None:
        """End it, by force if it does not end by itself; log how it failed if it did."""
        with trio.move_on_after(_GRACE_SECONDS):
            await self._process.wait()
        with suppress(ProcessLookupError, PermissionError):
            self._process.kill()
        with trio.move_on_after(_GRACE_SECONDS):  # one that runs as root is not ours to end
            await self._process.wait()
        if self._process.returncode:
            log.error("%s: %s %s: %s", self._image, self._program.name, self._how_it_ended(), self._words())
        self._said.close()

    def _failed(self, what: str) -> ImageError:
        if self._process.returncode is not None and self._process.returncode < 0:
            what = self._how_it_ended()
        return ImageError(ErrorKind.IO, f"{self._program.name} {what}: {self._words()}", path=self._image, op="mount")

    def _how_it_ended(self) -> str:
        code = self._process.returncode or 0
        return f"ended with exit code {code}" if code >= 0 else f"was ended by {_signal_name(-code)}"

    def _words(self) -> str:
        """What it said, on one line and of the image, not of our name for it; of much the start and the end."""
        size = os.fstat(self._said.fileno()).st_size
        if size <= _HEAD_BYTES + _TAIL_BYTES:
            said = [os.pread(self._said.fileno(), size, 0)]
        else:
            said = [
                os.pread(self._said.fileno(), _HEAD_BYTES, 0),
                os.pread(self._said.fileno(), _TAIL_BYTES, size - _TAIL_BYTES),
            ]
        parts = [" ".join(part.decode(errors="backslashreplace").split()) for part in said]
        return " … ".join(filter(None, parts)).replace(self._node, self._image) or "it did not say why"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def own_modules() -> dict[str, str]:
    """The environment for a program of tapfs's own modules, which need not be where Python looks."""
    package = str(Path(confined_program.__file__).parents[3])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def _require_reach(found: str, image: str) -> None:
    """See that a program may read a mount of its user: FUSE keeps root out, and so a program that becomes root."""
    if os.geteuid() == 0 or users_may_allow_others():
        return
    try:
        status = os.stat(found)
    except OSError:
        return
    if status.st_mode & stat.S_ISUID and status.st_uid == 0:
        raise ImageError(
            ErrorKind.DENIED,
            f"{found} runs as root (set-user-ID), and root may not read what an ordinary user mounts",
            path=image,
            op="mount",
            remedy=f"have the administrator add user_allow_other to {FUSE_CONFIGURATION}, or mount as root",
        )
