"""The process from which those of disks are forked: ``python -m tapfs.xen.disk.fork_server DESCRIPTOR PADDING``.

It has loaded what the process of a disk needs, and they share that memory until one of them writes it. The supervisor
asks for a process by a message on the socket DESCRIPTOR: the arguments of `tapfs.xen.disk.process`, and the lock of the
device as a descriptor. The answer is the number of the process, or what kept it from being made. Its parent is the
supervisor, as if that had started it. When the supervisor is gone this process ends, and the disks go on.
"""

from __future__ import annotations

import gc
import importlib
import os
import socket
import sys

from tapfs.disk.probe import load_all
from tapfs.serving.process_title import title_over
from tapfs.xen.disk import process
from tapfs.xen.disk.equal_pages import offer_pages
from tapfs.xen.process_handle import ANSWER

#: Modules that the process of a disk loads when it first needs them, which is nearly always.
_LATE = (
    *("tapfs.disk.live", "tapfs.disk.write_path", "tapfs.host.scratch", "tapfs.kernel.engine", "tapfs.kernel.writes"),
    *("tapfs.kernel.tables", "tapfs.kernel.xen_ring", "tapfs.serving.parked", "encodings.idna", "ipaddress"),
)

_MESSAGE_BYTES = 4096


def main() -> int:
    """Serve one supervisor until it is gone. In a forked process: serve a disk; the exit code."""
    _load()
    with socket.socket(fileno=int(sys.argv[1])) as supervisor:
        while True:
            message, descriptors, *_ = socket.recv_fds(supervisor, _MESSAGE_BYTES, 1)
            if not message:
                return 0
            words = message.decode().split("\0")
            made = _fork()
            if made is None:
                break
            for descriptor in descriptors:
                os.close(descriptor)
            supervisor.send(ANSWER.pack(*made))
    # The lock stays open for as long as this process lives.
    os.setsid()
    title_over(["-P", "-m", process.__name__, *words])
    return process.main(words)


def _load() -> None:
    for name in _LATE:
        importlib.import_module(name)
    load_all()
    # A collection in a forked process would write to all that is shared.
    gc.collect()
    gc.freeze()
    offer_pages()


def _fork() -> tuple[int, int] | None:
    """The number of a new process that is no child of this one, and 0, or 0 and an errno; None in the new process."""
    reading, writing = os.pipe()
    try:
        between = os.fork()
    except OSError as error:
        os.close(reading)
        os.close(writing)
        return 0, error.errno or 0
    if between == 0:
        os.close(reading)
        _fork_and_end(writing)
        return None
    os.close(writing)
    os.waitpid(between, 0)
    answer = os.read(reading, ANSWER.size)
    os.close(reading)
    pid, number = ANSWER.unpack(answer)
    return pid, number


def _fork_and_end(writing: int) -> None:
    """Fork once more, tell the number and end. Returns in the new process, whose parent becomes the supervisor."""
    try:
        pid, number = os.fork(), 0
    except OSError as error:
        pid, number = 0, error.errno or 0
    if pid == 0 and number == 0:
        os.close(writing)
        return
    os.write(writing, ANSWER.pack(pid, number))
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
