"""The process that starts a FUSE program for a mount, outside of the mount's sandbox, and says how the program ended.

The command is made of the user's words. The server of the mount is told the number of this process, what the program
says (a file in memory), and its exit code. A server that follows a killed one asks for both by the number, and a number
is obeyed only where that file shows that the process is one of these.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import socket
import stat
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from tapfs.errors import ErrorKind, ImageError
from tapfs.fuse.files.confined_program import ProgramCall, run
from tapfs.fuse.files.file_systems import program_for
from tapfs.fuse.files.mount_process import FilesWords, node_path, opened_node
from tapfs.fuse.settings import FUSE_CONFIGURATION, users_may_allow_others
from tapfs.records import replace
from tapfs.serving.messages import encode, failed, succeeded
from tapfs.serving.process_title import title_over
from tapfs.serving.processes import process_start

#: Requests of a server: start a program, end one, and give what one has said.
START, END, SAID = "start program", "end program", "what program said"


def serve(message: Mapping[str, Any], words: FilesWords, tree_directory: str, answers: socket.socket) -> None:
    """Start the program that shows a type of file systems, tell who it is, and when it has ended how it has.

    Be a process of its own. Raises ImageError; nothing was told then.
    """
    call = _call(words, message["type"], node_path(tree_directory, message["node"]), message["why_not_by_kernel"])
    os.setsid()
    said = os.memfd_create(_name_of_said(words.mountpoint))  # a folder for temporary files may be missing
    for stream in (1, 2):
        os.dup2(said, stream)
    title_over(["-m", __name__, words.mountpoint])
    number = os.getpid()
    try:
        socket.send_fds(answers, [encode(succeeded({"pid": number, "start": process_start(number)}))], [said])
    except OSError:
        return  # nobody is there who would look after it
    os.close(said)
    try:
        with opened_node(tree_directory, message["node"], os.O_PATH, words) as node:
            told = succeeded({"code": run(replace(call, held=f"/proc/self/fd/{node}"))})
    except ImageError as error:
        told = failed(error)
    except OSError as error:
        told = failed(ImageError(ErrorKind.IO, f"cannot be started: {error.strerror}", path=call.command[0]))
    with suppress(OSError):
        answers.send(encode(told))


def end(number: int, words: FilesWords, *, force: bool) -> None:
    """Have a program write back and end, or end it at once, by the number of its process. One that is gone is gone.

    Raises ImageError(invalid_argument) for what is no number.
    """
    _require_number(number)
    try:
        process = os.pidfd_open(number)
    except OSError:
        return
    try:
        if _is_ours(number, words):
            signal.pidfd_send_signal(process, signal.SIGQUIT if force else signal.SIGTERM)
    except ProcessLookupError:
        pass
    finally:
        os.close(process)


def said_by(number: int, words: FilesWords) -> int | None:
    """What a program has said, as a descriptor; None: it is gone. Raises ImageError as `end` does."""
    _require_number(number)
    try:
        # A process of the server can exchange its file at any moment. So the file is held before it is judged.
        place = os.open(f"/proc/{number}/fd/1", os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        held = f"/proc/self/fd/{place}"
        ours = _is_own(number) and _is_said(held, words)
        return os.open(held, os.O_RDONLY | os.O_CLOEXEC) if ours else None
    except OSError:
        return None
    finally:
        os.close(place)


def _require_number(number: object) -> None:
    """Raise ImageError for what is no number: in a path it would lead elsewhere."""
    if type(number) is not int:
        raise ImageError(ErrorKind.INVALID_ARGUMENT, "is no number of a process", path=str(number), op="mount")


def _name_of_said(mountpoint: str) -> str:
    return f"tapfs-said-{hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:32]}"


def _is_ours(number: int, words: FilesWords) -> bool:
    """Whether the process of this number is one of this module's, for this mount."""
    try:
        return _is_own(number) and _is_said(f"/proc/{number}/fd/1", words)
    except OSError:
        return False


def _is_own(number: int) -> bool:
    """Whether the process of this number is one of this user's. Raises OSError."""
    return os.stat(f"/proc/{number}").st_uid == os.geteuid()


def _is_said(link: str, words: FilesWords) -> bool:
    """Whether a link of /proc leads to what a program of this mount says. Raises OSError."""
    return os.readlink(link) == f"/memfd:{_name_of_said(words.mountpoint)} (deleted)"


def _call(words: FilesWords, type_name: str, node: str, why_not_by_kernel: str) -> ProgramCall:
    """What to start for a type. Raises ImageError: unsupported where it is not installed, denied where it is no use."""
    words.require_known(type_name)
    settings = words.settings
    options = words.owner_options(type_name)
    program = program_for(type_name)
    if program is None:
        raise ImageError(ErrorKind.UNSUPPORTED, why_not_by_kernel, path=words.image, op="mount")
    found = shutil.which(program.name)
    if found is None:
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            f"{why_not_by_kernel}, and without the kernel it needs {program.name}",
            path=words.image,
            op="mount",
            remedy=f"apt install {program.package}",
        )
    if not settings.confined:
        _require_reach(found, words.image)
    flags = settings.flags
    options += (name for name in ("suid", "dev") if name in flags and os.geteuid() == 0)
    options += (f"no{name}" for name in ("suid", "dev") if name not in flags)
    options += (name for name in ("noexec", "nonempty") if name in flags)
    options += ["allow_other"] if settings.allow_other else []
    if program.lets_others_in and not settings.allow_other and settings.umask is None:
        options.append("umask=077")
    writable = words.writes(type_name)
    command = program.command(node, words.mountpoint, writable=writable, more=options)
    return ProgramCall(
        [found, *command[1:]],
        node,
        words.mountpoint,
        writable=writable,
        flags=sorted(flags),
        allow_other=settings.allow_other,
        confined=settings.confined,
    )


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
