"""A FUSE program at work, as the server of the mount has it: await its mount's answer, and say why there is none."""

from __future__ import annotations

import os
import select
import signal
import socket
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import IO, Protocol, Self

import trio

from tapfs.errors import ErrorKind, ImageError
from tapfs.fuse.files import program_process
from tapfs.fuse.files.file_systems import Program
from tapfs.fuse.mount_table import MountedFileSystem, top_mount
from tapfs.fuse.outside import Outside, answer_of
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


class _Process(Protocol):
    """The process of a program, which a process outside has started."""

    @property
    def pid(self) -> int: ...

    @property
    def returncode(self) -> int | None: ...

    def poll(self) -> int | None: ...

    async def wait(self) -> int: ...


class _Told:
    """One whose end this process is told of: how it ended comes over a socket."""

    def __init__(self, pid: int, told: socket.socket) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._told = told

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._told], [], [], 0)[0]:
            self._take()
        return self.returncode

    async def wait(self) -> int:
        if self.returncode is None:
            await trio.lowlevel.wait_readable(self._told)
            self._take()
        return self.returncode or 0

    def _take(self) -> None:
        if self.returncode is None:
            self.returncode = 0  # whoever was killed says nothing
            with self._told, suppress(ImageError):
                self.returncode = int(answer_of(self._told).fields.get("code", 0))


class _Followed:
    """One that was started for a server before this one; how it ended is not to be known."""

    def __init__(self, pid: int, start: int) -> None:
        self.pid = pid
        self._descriptor: int | None = None
        with suppress(OSError):
            self._descriptor = os.pidfd_open(pid)
        if process_start(pid) != start:
            self._close()

    @property
    def returncode(self) -> int | None:
        return None if self._descriptor is not None else 0

    def poll(self) -> int | None:
        if self._descriptor is not None and select.select([self._descriptor], [], [], 0)[0]:
            self._close()
        return self.returncode

    async def wait(self) -> int:
        if self._descriptor is not None:
            await trio.lowlevel.wait_readable(self._descriptor)
            self._close()
        return 0

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


class RunningProgram:
    """The process of `program`, which mounts the file system of an image (named `image` in errors)."""

    def __init__(
        self, program: Program, image: str, node: str, process: _Process, said: IO[bytes], outside: Outside
    ) -> None:
        """Take over a process and the file that it writes its messages to. Use `start`."""
        self._program = program
        self._image = image
        self._node = node
        self._process = process
        self._said = said
        self._outside = outside

    @classmethod
    def start(cls, program: Program, outside: Outside, message: Mapping[str, object], *, image: str, node: str) -> Self:
        """Have it started; that waits for nothing. `message`: see `tapfs.fuse.files.program_process`.

        Raises ImageError(unsupported) if it is not installed, (denied) if it could not read the disk.
        """
        told = outside.begin(message)
        try:
            answer = answer_of(told)
            said: IO[bytes] = os.fdopen(answer.descriptor if answer.descriptor is not None else _nothing(), "rb")
        except BaseException:
            told.close()
            raise
        return cls(program, image, node, _Told(int(answer.fields["pid"]), told), said, outside)

    @classmethod
    def again(cls, program: Program, outside: Outside, started: tuple[int, int], *, image: str, node: str) -> Self:
        """The one that was started for another server, by its number and the time of its start."""
        process = _Followed(*started)
        found: int | None = None
        with suppress(ImageError):
            found = outside.ask({"request": program_process.SAID, "pid": process.pid}).descriptor
        return cls(program, image, node, process, os.fdopen(_nothing() if found is None else found, "rb"), outside)

    @property
    def started(self) -> tuple[int, int]:
        """What another process knows it by."""
        return self._process.pid, process_start(self._process.pid) or 0

    async def answers_at(
        self, mountpoint: str, before: MountedFileSystem | None, look: Callable[[], Awaitable[object]]
    ) -> None:
        """Wait until its mount, not that which was there `before`, answers who looks. Raises ImageError."""
        process = self._process
        try:
            while top_mount(mountpoint) == before:
                if process.poll() is not None:
                    raise self._failed("did not mount it")
                await trio.sleep(_LOOK_SECONDS)
            try:
                await look()
            except ImageError as error:
                with trio.move_on_after(_GRACE_SECONDS):
                    await process.wait()
                raise self._failed("mounted it, but does not answer") from error
        except trio.Cancelled:
            self._end(force=True)
            raise

    async def ended(self) -> None:
        """Wait until it has written everything and ended."""
        await self._process.wait()

    async def told_to_end(self) -> None:
        """Have it write everything back and end, though its mount cannot be taken away; wait for that."""
        self._end(force=False)
        with trio.move_on_after(_WRITE_BACK_SECONDS):
            await self._process.wait()

    async def put_away(self) -> None:
        """End it, by force if it does not end by itself; log how it failed if it did."""
        with trio.move_on_after(_GRACE_SECONDS):
            await self._process.wait()
        if self._process.poll() is None:
            self._end(force=True)
        with trio.move_on_after(_GRACE_SECONDS):  # one that runs as root is not ours to end
            await self._process.wait()
        if self._process.returncode:
            log.error("%s: %s %s: %s", self._image, self._program.name, self._how_it_ended(), self._words())
        self._said.close()

    def _end(self, *, force: bool) -> None:
        with suppress(ImageError):  # who could do that is gone
            self._outside.ask({"request": program_process.END, "pid": self._process.pid, "force": force})

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


def _nothing() -> int:
    return os.memfd_create("said")
