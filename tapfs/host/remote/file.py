"""Remote files: a file that lies elsewhere, as a sparse local copy that has what was read of it."""

from __future__ import annotations

import os
from contextlib import ExitStack

from tapfs.errors import from_os_error
from tapfs.host.copied import CopiedFile, Copy, Shared
from tapfs.host.file import LocalFile
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


def _copy_of(
    address: Address, descriptor: int, fetching: Fetching, options: RemoteOptions, kept: KeptCopy | None
) -> Copy:
    """The copy of what a process fetches, with what a kept one has of it. Raises OSError."""
    facts = fetching.facts
    block = _BLOCK_BYTES
    while facts.size > block * _MOST_BLOCKS:
        block *= 2
    presence = Presence(block, facts.size, fetching, limit_bytes=options.copy_bytes)
    if kept is not None:
        _take_up(kept, address, block, fetching, presence)
    os.ftruncate(descriptor, facts.size)
    copy = Copy(descriptor, _Elsewhere(address, fetching), place=(address.identity, 0), presence=presence)
    copy.sparse = fetching if fetching.tells_holes else None
    return copy


def _take_up(kept: KeptCopy, address: Address, block_bytes: int, fetching: Fetching, presence: Presence) -> None:
    """Use what a kept copy has of the same object, and keep what comes."""
    facts = fetching.facts
    if facts.identity is None:
        # Nobody could tell whether the bytes are still the same.
        kept.drop()
        return
    found = KeptList.of(kept.list_path, address, facts, block_bytes, kept.descriptor)
    blocks = found.load(len(presence.blocks)) if os.fstat(kept.descriptor).st_size == facts.size else None
    if blocks is None:
        found.remove()
        os.ftruncate(kept.descriptor, 0)
    else:
        presence.here_already(bytes(blocks))
    fetching.keep(found, block_bytes)


class _Elsewhere:
    """What is fetched: a `tapfs.host.copied.Origin`."""

    def __init__(self, address: Address, fetching: Fetching) -> None:
        self._address = address
        self._fetching = fetching

    def allocated_size(self) -> int:
        """Its length: nobody says what it takes where it lies."""
        return self._fetching.facts.size

    def modified_seconds(self) -> int:
        """The modification time in whole seconds since 1970, 0 if nobody has said it."""
        return self._fetching.facts.modified

    def real_path(self) -> str:
        """The address."""
        return self._address.text

    def close(self) -> None:
        """Let go of the process that fetches."""
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
    with ExitStack() as on_error:
        on_error.callback(os.close, descriptor)
        fetching = Fetching(address, descriptor, options)
        on_error.callback(fetching.close)
        try:
            copy = _copy_of(address, descriptor, fetching, options, kept)
        except OSError as error:
            raise from_os_error(error, path=address.text, op="make a local copy") from error
        on_error.pop_all()
    return CopiedFile(address.text, Shared(copy))
