"""The sandbox for programs that use `import tapfs`: they say themselves what they need, and give up all else."""

from __future__ import annotations

import os
from collections.abc import Iterable

from tapfs.errors import ErrorKind, ImageError
from tapfs.host.sandbox import confinement
from tapfs.host.sandbox.filter import Calls

_Paths = Iterable[str | os.PathLike[str]]


def enter_sandbox(
    *,
    read: _Paths = (),
    write: _Paths = (),
    make: _Paths = (),
    network: bool = False,
    programs: bool = False,
    processes: bool = False,
) -> str:
    """Have this process read, write and make no other files from now on, for good, and what it starts as well.

    `read`: files, and folders with all below them. `write`: files that are written in place. `make`: folders in which
    files are made, replaced and removed. Without `network` there are no sockets but those that are open already;
    without `programs` and `processes` the process starts none. It is called by the only thread, before the first image
    is opened. Scratch files in $TMPDIR or /var/tmp stay possible. No core file is left.

    The result is "on", "on, without" what this kernel does not have, or "off" where TAPFS_SANDBOX=off says so. Raises
    ImageError: invalid_argument where there are other threads, which would be outside, or where it was called before.
    """
    op = "enter the sandbox"
    if confinement.is_entered():
        message, remedy = "this process is in its sandbox already", "name everything in one call"
        raise ImageError(ErrorKind.INVALID_ARGUMENT, message, op=op, remedy=remedy)
    if len(os.listdir("/proc/self/task")) > 1:
        message = "this process has more than one thread, and the others would stay outside"
        raise ImageError(ErrorKind.INVALID_ARGUMENT, message, op=op, remedy="enter it before the first thread")
    confinement.enter(
        confinement.Needs(
            read=_real(read),
            write=_real(write),
            make=_real(make),
            scratch=True,
            keeps_scratch=True,
            calls=Calls(programs=programs, forks=processes, network=network),
            cache_bytes=None,
        )
    )
    return confinement.description()


def _real(paths: _Paths) -> tuple[str, ...]:
    return tuple(os.path.realpath(path) for path in paths)
