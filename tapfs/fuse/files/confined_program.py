"""Run a FUSE program in a sandbox, mount in its place, and end as it does.

The program parses a file system that a stranger may have made. So it gets the file that it reads, and nothing else of
the host. It cannot mount then, and need not be set-user-ID: this process, its parent, mounts for it, once, at the mount
point that it was started with. The serving process runs this module as a program, with a request as JSON on standard
input. What the program says goes where this process's words go.
"""

from __future__ import annotations

import errno
import os
import re
import select
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import NoReturn

from tapfs.errors import ErrorKind, ImageError
from tapfs.fuse.connection import MountOptions, connect
from tapfs.fuse.mount_table import FILE_SYSTEM_TYPE
from tapfs.host.sandbox import supervised
from tapfs.records import dataclass
from tapfs.serving.messages import MESSAGE_LIMIT, decode, encode

#: Options of the kernel that the program may ask for beside those of the request.
_OPTIONS = re.compile(r"default_permissions|max_read=\d+|blksize=\d+")
#: No descriptor has more digits: a longer number would fit into no message to the kernel.
_CONNECTION = re.compile(r"fd=(\d{1,9})")
_KIND = re.compile(r"fuse(blk)?(\.[\w-]+)?")


@dataclass(frozen=True, slots=True)
class ProgramRequest:
    """Start the program of the words `command`, which reads the file `node`, and mount it on `mountpoint`.

    `flags` are those of `tapfs.fuse.settings.MountSettings`; `allow_other`: others are let in, if it asks for that.
    """

    command: Sequence[str]
    node: str
    mountpoint: str
    writable: bool
    flags: Sequence[str]
    allow_other: bool

    def packed(self) -> bytes:
        """The program's input."""
        return encode(asdict(self))


def main() -> int:
    """Do what standard input says."""
    request = ProgramRequest(**decode(sys.stdin.buffer.readline(MESSAGE_LIMIT)))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = os.fork()
    if child == 0:
        ours.close()
        _become(request, theirs)
    # The program writes back and ends; without this process it would be killed.
    signal.signal(signal.SIGTERM, lambda _number, _frame: os.kill(child, signal.SIGTERM))
    theirs.close()
    with ours:
        _, listeners, _, _ = socket.recv_fds(ours, 1, 1)
    if listeners:
        _supervise(request, child, listeners[0])
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -code)
    return code


def _become(request: ProgramRequest, channel: socket.socket) -> NoReturn:
    """In the child: enter the sandbox, tell the parent what it is told by, and become the program."""
    try:
        program = request.command[0]
        folder = os.path.dirname(program)
        os.chdir(folder)  # ntfs-3g looks at the folder that it is in
        writable = ["/dev/fuse", *([request.node] if request.writable else [])]
        listener = supervised.enter(folder, [request.mountpoint, request.node], writable)
        socket.send_fds(channel, [b"+"], [listener])
        os.close(listener)
        os.execv(program, [os.path.basename(program), *request.command[1:]])  # noqa: S606  no shell is wanted
    except OSError as error:
        os.write(2, f"cannot start {request.command[0]}: {error.strerror}\n".encode())
    finally:
        os._exit(127)


def _supervise(request: ProgramRequest, child: int, listener: int) -> None:
    """Mount for the program until it ends."""
    poll = select.poll()
    process = os.pidfd_open(child)
    poll.register(process, select.POLLIN)
    poll.register(listener, select.POLLIN)
    mounted = False
    while True:
        ready = dict(poll.poll())
        if process in ready:
            return
        call = supervised.told(listener)
        if call is None:
            continue
        if mounted:
            supervised.refuse(listener, call.id, errno.EACCES)
            continue
        mounted = _mount(request, listener, call)


def _mount(request: ProgramRequest, listener: int, call: supervised.MountCall) -> bool:
    """What the program asked for by mount(2), as far as the request allows it; whether it was done."""
    theirs = next((found for each in call.data.split(",") if (found := _CONNECTION.fullmatch(each))), None)
    if theirs is None or not _KIND.fullmatch(call.kind):
        supervised.refuse(listener, call.id, errno.EACCES)
        return False
    try:
        ours = connect(request.mountpoint, _options(request, call))
    except ImageError as error:
        os.write(2, f"{error.message}\n".encode(errors="backslashreplace"))
        # EPERM would have it try fusermount3.
        supervised.refuse(listener, call.id, errno.EACCES if error.kind is ErrorKind.DENIED else errno.EIO)
        return False
    supervised.accept(listener, call, ours, int(theirs[1]))
    os.close(ours)
    return True


def _options(request: ProgramRequest, call: supervised.MountCall) -> MountOptions:
    asked = call.data.split(",")
    others = [each for each in asked if _OPTIONS.fullmatch(each)]
    if request.allow_other and "allow_other" in asked:
        others.append("allow_other")
    named = call.kind if call.kind.startswith("fuse.") and call.kind != FILE_SYSTEM_TYPE else None
    kind = named or f"fuse.{os.path.basename(request.command[0])}"
    return MountOptions(request.node, not request.writable, others, type=kind, flags=frozenset(request.flags))


if __name__ == "__main__":
    sys.exit(main())
