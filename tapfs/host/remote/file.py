"""Remote files: a file that lies elsewhere, as a sparse local copy that has what was read of it."""

from __future__ import annotations

import os

from tapfs.errors import from_os_error
from tapfs.host.file import LocalFile
from tapfs.host.lock import Sharing
from tapfs.host.presence import Presence
from tapfs.host.remote.address import Address
from tapfs.host.remote.fetching import Fetching
from tapfs.host.remote.kept_copy import KeptCopy, KeptList
from tapfs.host.remote.options import USUAL, RemoteOptions
from tapfs.host.remote.source import refuse_writing
from tapfs.host.scratch import unnamed_descriptor

#: The copy is kept in blocks of so many bytes, or in larger ones where they would be more than the other number.
_BLOCK_BYTES = 64 << 10
_MOST_BLOCKS = 4 << 20


class RemoteFile(LocalFile):
    """An open file that lies elsewhere, to the engine and to drivers a local file of which not everything is here."""

    def __init__(
        self, address: Address, descriptor: int, fetching: Fetching, options: RemoteOptions, kept: KeptCopy | None
    ) -> None:
        """Take over the descriptor of the copy, which is empty unless it is `kept`, and the process that fetches."""
        self._fetching = fetching
        super().__init__(address.text, descriptor, writable=False, sharing=Sharing.UNCHECKED)
        facts = fetching.facts
        self._modified = facts.modified
        self.identity = address.identity
        block = _BLOCK_BYTES
        while facts.size > block * _MOST_BLOCKS:
            block *= 2
        self.presence = Presence(block, facts.size, fetching, limit_bytes=options.copy_bytes)
        try:
            if kept is not None:
                self._take_up(kept, address, block)
            os.ftruncate(descriptor, facts.size)
        except OSError as error:
            self.close()
            raise from_os_error(error, path=self.path, op="make a local copy") from error

    def _take_up(self, kept: KeptCopy, address: Address, block_bytes: int) -> None:
        """Use what a kept copy has of the same object, and keep what comes."""
        facts = self._fetching.facts
        if facts.identity is None or self.presence is None:
            # Nobody could tell whether the bytes are still the same.
            kept.drop()
            return
        found = KeptList.of(kept.list_path, address, facts, block_bytes, self.descriptor)
        blocks = found.load(len(self.presence.blocks)) if os.fstat(self.descriptor).st_size == facts.size else None
        if blocks is None:
            found.remove()
            os.ftruncate(self.descriptor, 0)
        else:
            self.presence.here_already(bytes(blocks))
        self._fetching.keep(found, block_bytes)

    def allocated_size(self) -> int:
        """Bytes that the file takes where it lies, as far as its length says that."""
        return self.size()

    def modified_seconds(self) -> int:
        """The modification time in whole seconds since 1970, 0 if nobody has said it."""
        return self._modified

    def real_path(self) -> str:
        """The address."""
        return self.path

    def close(self) -> None:
        """Let go of the copy and of the process that fetches."""
        super().close()
        self._fetching.close()


def open_remote(address: Address, options: RemoteOptions = USUAL, *, writable: bool = False) -> LocalFile:
    """Open what lies at an address. Raises ImageError."""
    if writable:
        refuse_writing(address)
        from tapfs.host.remote.written_file import open_written  # few images are written elsewhere

        return open_written(address, options)
    kept = None if options.kept_in is None else KeptCopy.open(options.kept_in, address)
    if kept is None:
        descriptor = unnamed_descriptor("make a local copy of a file that lies elsewhere")
    else:
        descriptor = kept.descriptor
    try:
        fetching = Fetching(address, descriptor, options)
    except BaseException:
        os.close(descriptor)
        raise
    return RemoteFile(address, descriptor, fetching, options, kept)
