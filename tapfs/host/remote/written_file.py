"""Files elsewhere that are written: to drivers and to the engine a file of this host, by a process that shows it so."""

from __future__ import annotations

import os
import socket
from dataclasses import asdict

from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.host.file import UNCHANGED, LocalFile, SecondUse
from tapfs.host.lock import Sharing
from tapfs.host.remote import messages
from tapfs.host.remote.address import Address
from tapfs.host.remote.options import RemoteOptions


class WrittenFile(LocalFile):
    """An open file elsewhere that takes writes. It has its length for good, as a block device has.

    A write that has returned has reached the other side, and a sync reaches what keeps the bytes there.
    """

    def __init__(self, address: Address, descriptor: int) -> None:
        """Take over a descriptor of what the writing process shows."""
        super().__init__(address.text, descriptor, writable=True, sharing=Sharing.UNCHECKED)
        self._address = address
        self.identity = address.identity
        self.is_block_device = True

    def duplicate(self, *, direct: bool = False) -> WrittenFile:
        """See `LocalFile.duplicate`; there is no page cache to go past."""
        del direct
        return WrittenFile(self._address, os.dup(self.descriptor))

    def again(self, use: SecondUse = UNCHANGED) -> LocalFile:
        """See `LocalFile.again`; it is called by its address, and takes writes as this one does."""
        return self.duplicate(direct=use.direct)

    def modified_seconds(self) -> int:
        """Nobody says when the file was changed."""
        return 0

    def real_path(self) -> str:
        """The address."""
        return self.path


def open_written(address: Address, options: RemoteOptions) -> WrittenFile:
    """Open what lies at an address for writing. Raises ImageError."""
    name = str(address)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    with ours:
        with theirs:
            started = messages.start_outside(messages.WRITER, name, [theirs.fileno()])
        try:
            messages.send(ours, {"number": 1, "address": address.text, "options": asdict(options)})
            answer, descriptor = messages.receive_with_descriptor(ours)
        except OSError as error:
            raise from_os_error(error, path=name, op="open what is written elsewhere") from error
        finally:
            messages.let_go(started)
    if (met := messages.error_of(answer)) is not None:
        raise met
    if descriptor is None:
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            "the process that writes elsewhere could not start",
            path=name,
            op="open",
            remedy="it needs FUSE: pip install 'tapfs[fuse]'",
        )
    return WrittenFile(address, descriptor)
