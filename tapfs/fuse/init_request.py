"""Agree with the kernel at INIT where pyfuse3 alone serves a connection.

libfuse accepts nearly all that the kernel offers, and pyfuse3 has no way to refuse a part of it. So the kernel's INIT
is read from the connection here. libfuse reads it from a socket, without the offers that a disk must not accept. After
libfuse has read the INIT, and before libfuse answers, the connection takes the place of the socket.

A server that follows a killed one shows libfuse the INIT of the first. libfuse's answer to that means nothing to the
kernel, which knows no such request any more: it refuses the answer with ENOENT, and libfuse does not mind that.
"""

from __future__ import annotations

import os
import socket
import struct
from contextlib import suppress

from tapfs.errors import from_os_error

#: With this (FUSE_ATOMIC_O_TRUNC) the kernel sets the size to 0 and drops its pages when a file is opened with O_TRUNC,
#: without asking. The size of a disk does not change, so dirty pages of a program that maps the disk would be lost.
_ATOMIC_O_TRUNC = 1 << 3

_REFUSED = _ATOMIC_O_TRUNC

#: Has the kernel give every request again that was read and not answered; of the second word of flags the bit by which
#: it says that it does, and the bit of the first that there is a second (Linux 6.9).
_NOTIFY_RESEND = 7
_HAS_RESEND, _EXTENDED = 1 << 7, 1 << 30

#: Bytes of the buffer for a request: at least as many as the kernel demands of a reader.
_LONGEST = (1 << 20) + 4096

#: fuse_in_header, then the start of fuse_init_in: major, minor, max_readahead, flags.
_HEADER = struct.Struct("=IIQQIIII")
_FLAGS_AT = _HEADER.size + 12
#: fuse_out_header of a notification: length, code, zero.
_NOTIFICATION = struct.Struct("=IiQ")


class PlainConnection:
    """A mounted FUSE connection that pyfuse3 is to serve alone.

    Takes over `connection`. `session_path` is what pyfuse3 takes as the mount point, and `accepted` must be called
    from its `init` handler. With `init`, the INIT of the first server, it goes on where a killed one has served.
    Raises ImageError(io) if the kernel has ended the connection.
    """

    def __init__(self, connection: int, mountpoint: str, init: bytes | None = None) -> None:
        self._connection: int | None = connection
        try:
            self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:
            os.close(connection)
            raise from_os_error(error, path=mountpoint, op="begin to serve the mount") from error
        try:
            if init is None:
                init = os.read(connection, _LONGEST)
            else:
                # Before anything is read: what is given again now was read by the last server, and by nobody else.
                os.write(connection, _NOTIFICATION.pack(_NOTIFICATION.size, _NOTIFY_RESEND, 0))
            self._init = init
            self._ours.sendall(_without_refused(init))
        except BaseException as error:
            theirs.close()
            self.close()
            if isinstance(error, OSError):
                raise from_os_error(error, path=mountpoint, op="begin to serve the mount") from error
            raise
        #: libfuse closes it.
        self._theirs = theirs.detach()

    def session_path(self) -> str:
        """The path of the descriptor, which pyfuse3 owns from now on."""
        return f"/dev/fd/{self._theirs}"

    def init_request(self) -> bytes | None:
        """What a successor needs; None where the kernel could not give it the requests that were not answered."""
        first, second = struct.unpack_from("=II", self._init.ljust(_FLAGS_AT + 8, b"\0"), _FLAGS_AT)
        return self._init if first & _EXTENDED and second & _HAS_RESEND else None

    @property
    def connection(self) -> int:
        """The descriptor of the connection; once INIT was accepted it is pyfuse3's."""
        return self._theirs if self._connection is None else self._connection

    def accepted(self) -> None:
        """Put the connection in the place of the socket: libfuse has read INIT, and answers next."""
        if self._connection is not None:
            os.dup2(self._connection, self._theirs, inheritable=False)
            self.close()

    def close(self) -> None:
        """Close what is still ours; closing twice is allowed."""
        if self._connection is not None:
            with suppress(OSError):
                os.close(self._connection)
            self._connection = None
        self._ours.close()


def _without_refused(request: bytes) -> bytes:
    """INIT without the offers that are refused."""
    changed = bytearray(request)
    (flags,) = struct.unpack_from("=I", changed, _FLAGS_AT)
    struct.pack_into("=I", changed, _FLAGS_AT, flags & ~_REFUSED)
    return bytes(changed)
