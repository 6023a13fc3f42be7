"""The handover from the server of a mount to its keeper, by which another server goes on after a kill.

The keeper (`tapfs.fuse.keeper`) holds the descriptors of the connection to the kernel, so the connection outlives the
server. With them come a few facts that only the first server of a mount has seen. The message is JSON. The keeper does
not read it, because the server that wrote it has parsed an image.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from tapfs.errors import ErrorKind, ImageError
from tapfs.fuse.tree import PartitionWindow

#: The longest message; a disk has at most some hundred partitions.
MESSAGE_BYTES = 128 << 10
MAX_CONNECTIONS = 16

#: The message of a server that ends in order: there is nothing more to keep.
_NOTHING = b"{}"


class ShownFiles(NamedTuple):
    """The file system of a mount with --files: its type, and the device (MAJOR:MINOR) of its mount.

    `program` is the process that shows it with the time of its start (`process_start`); None: the kernel does.
    """

    type: str | None
    device: str
    program: tuple[int, int] | None


class Handover(NamedTuple):
    """What a successor has to know.

    `native`: native threads serve, else pyfuse3 alone does. `init` is the kernel's INIT request. `backing` has what the
    kernel knows the files of passed-through nodes by. `partitions` are those of the tree, which are those of the disk
    when it was mounted. `modified_ns` is the time that the files show. What the disk is shown as, too, follows from
    `seed`. `files`: the files inside are shown.
    """

    native: bool
    init: bytes
    backing: Mapping[int, int]
    partitions: Sequence[PartitionWindow]
    modified_ns: int
    seed: bytes
    files: ShownFiles | None = None

    def packed(self) -> bytes:
        """The message."""
        data = self._asdict() | {"init": self.init.hex(), "seed": self.seed.hex()}
        return json.dumps(data).encode()

    @classmethod
    def unpacked(cls, message: bytes) -> Handover:
        """The reverse of `packed`. Raises ImageError(io)."""
        try:
            data = json.loads(message)
            return cls(
                bool(data["native"]),
                bytes.fromhex(data["init"]),
                {int(inode): int(number) for inode, number in data["backing"].items()},
                [PartitionWindow(*map(int, each)) for each in data["partitions"]],
                int(data["modified_ns"]),
                bytes.fromhex(data["seed"]),
                _unpacked_files(data["files"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ImageError(ErrorKind.IO, f"what the last server left cannot be read: {error}", op="go on") from error


def _unpacked_files(data: Any) -> ShownFiles | None:
    if data is None:
        return None
    type_name, device, program = data
    started = None if program is None else (int(program[0]), int(program[1]))
    return ShownFiles(None if type_name is None else str(type_name), str(device), started)


class Kept(NamedTuple):
    """What a keeper holds: the message of a server, and the descriptors of the connection."""

    message: bytes
    connections: tuple[int, ...]

    def close(self) -> None:
        """Let go of the connection."""
        for connection in self.connections:
            os.close(connection)


class ServerEnd:
    """The server's end of the socket to its keeper, the process `keeper`."""

    def __init__(self, end: socket.socket, keeper: int) -> None:
        self._socket = end
        self.keeper = keeper

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def keep(self, handover: Handover, connections: Sequence[int]) -> None:
        """From now on a kill of this process is a pause, unless the keeper is gone."""
        with suppress(OSError):
            socket.send_fds(self._socket, [handover.packed()], list(connections))

    def let_go(self) -> None:
        """This server ends in order: have the keeper close its descriptors."""
        with suppress(OSError):
            self._socket.sendall(_NOTHING)


class KeeperEnd:
    """The keeper's end of the socket to one server."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def fileno(self) -> int:
        """The descriptor, for `select`."""
        return self._socket.fileno()

    def take(self, held: Kept | None) -> tuple[Kept | None, bool]:
        """What is to be held after the next message, and whether the socket is open. What is replaced is closed."""
        try:
            message, descriptors, _, _ = socket.recv_fds(self._socket, MESSAGE_BYTES, MAX_CONNECTIONS)
        except OSError:
            return held, False
        if not message:
            return held, False
        if held is not None:
            held.close()
        if message == _NOTHING:
            return None, True
        return Kept(message, tuple(descriptors)), True

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


def ends() -> tuple[KeeperEnd, ServerEnd]:
    """A new pair, made by the keeper. Raises OSError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return KeeperEnd(ours), ServerEnd(theirs, os.getpid())
