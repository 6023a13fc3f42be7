"""Run a FUSE program in a sandbox, mount in its place, and see it end.

The program parses a file system that a stranger may have made. So it gets the file that it reads, and nothing else of
the host. It cannot mount then, and need not be set-user-ID: this process, its parent, mounts for it, once, at the mount
point that it was started with.
"""

from __future__ import annotations

import errno
import os
import re
import select
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from tapfs.errors import ErrorKind, ImageError
from tapfs.host.fuse_connection import FILE_SYSTEM_TYPE, MountOptions, connect
from tapfs.host.sandbox import supervised
from tapfs.records import dataclass
from tapfs.serving.signals import ENDING

#: Options of the kernel that the program may ask for beside those of the request.
_OPTIONS = re.compile(r"default_permissions|max_read=\d+|blksize=\d+")
#: No descriptor has more digits: a longer number would fit into no message to the kernel.
_CONNECTION = re.compile(r"fd=(\d{1,9})")
_KIND = re.compile(r"fuse(blk)?(\.[\w-]+)?")


#: A program gets them as they are usual; Python and the process outside ignore some.
_USUAL = (*ENDING, signal.SIGQUIT, signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ)


@dataclass(frozen=True, slots=True)
class ProgramCall:
    """Start the program of the words `command`, which reads the file `node`, and mount it on `mountpoint`.

    `flags` are those of `tapfs.fuse.settings.MountSettings`; `allow_other`: others are let in, if it asks for that.
    Without a sandbox (`confined`) it mounts itself. `held` is a path of the opened `node`, which the sandbox is to
    let it read, whatever lies at `node` by then; empty: `node` is trusted.
    """

    command: Sequence[str]
    node: str
    mountpoint: str
    writable: bool
    flags: Sequence[str]
    allow_other: bool
    confined: bool = True
    held: str = ""


def run(call: ProgramCall) -> int:
    """Run it to its end; its exit code, or minus the number of the signal that has ended it.

    SIGTERM has it write back and end, SIGQUIT ends it at once. Be the only thread.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    held = signal.pthread_sigmask(signal.SIG_BLOCK, _USUAL)
    child = os.fork()
    if child == 0:
        ours.close()
        _become(call, theirs)
    # Without this process one in a sandbox would be killed.
    signal.signal(signal.SIGTERM, lambda _number, _frame: _tell(child, signal.SIGTERM))
    signal.signal(signal.SIGQUIT, lambda _number, _frame: _tell(child, signal.SIGKILL))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, held)
    theirs.close()
    with ours:
        _, listeners, _, _ = socket.recv_fds(ours, 1, 1)
    if listeners:
        _supervise(call, child, listeners[0])
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def _tell(child: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):  # one that has become root is not ours to end
        os.kill(child, number)


def _become(call: ProgramCall, channel: socket.socket) -> NoReturn:
    """In the child: enter the sandbox, tell the parent what it is told by, and become the program."""
    try:
        program = call.command[0]
        folder = os.path.dirname(program)
        os.chdir(folder)  # ntfs-3g looks at the folder that it is in
        for number in _USUAL:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        if call.confined:
            node = call.held or call.node
            writable = ["/dev/fuse", *([node] if call.writable else [])]
            listener = supervised.enter(folder, [call.mountpoint, node], writable)
            socket.send_fds(channel, [b"+"], [listener])
            os.close(listener)
        os.execv(program, [os.path.basename(program), *call.command[1:]])  # noqa: S606  no shell is wanted
    except OSError as error:
        os.write(2, f"cannot start {call.command[0]}: {error.strerror}\n".encode())
    finally:
        os._exit(127)


def _supervise(program: ProgramCall, child: int, listener: int) -> None:
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
        mounted = _mount(program, listener, call)


def _mount(program: ProgramCall, listener: int, call: supervised.MountCall) -> bool:
    """What the program asked for by mount(2), as far as it was allowed; whether it was done."""
    theirs = next((found for each in call.data.split(",") if (found := _CONNECTION.fullmatch(each))), None)
    if theirs is None or not _KIND.fullmatch(call.kind):
        supervised.refuse(listener, call.id, errno.EACCES)
        return False
    try:
        ours = connect(program.mountpoint, _options(program, call))
    except ImageError as error:
        os.write(2, f"{error.message}\n".encode(errors="backslashreplace"))
        # EPERM would have it try fusermount3.
        supervised.refuse(listener, call.id, errno.EACCES if error.kind is ErrorKind.DENIED else errno.EIO)
        return False
    supervised.accept(listener, call, ours, int(theirs[1]))
    os.close(ours)
    return True


def _options(program: ProgramCall, call: supervised.MountCall) -> MountOptions:
    asked = call.data.split(",")
    others = [each for each in asked if _OPTIONS.fullmatch(each)]
    if program.allow_other and "allow_other" in asked:
        others.append("allow_other")
    named = call.kind if call.kind.startswith("fuse.") and call.kind != FILE_SYSTEM_TYPE else None
    kind = named or f"fuse.{os.path.basename(program.command[0])}"
    return MountOptions(program.node, not program.writable, others, type=kind, flags=frozenset(program.flags))
