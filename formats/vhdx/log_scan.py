"""The newest valid sequence of entries in a log: what a replay does (docs/specs/vhdx.md, "Log").

The time is linear in the length of the log, whatever is in it. A valid entry can hold no header of another one, because
each of its sectors has a signature of its own; so no byte is summed twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from tapfs.driver import HostFile
from tapfs.formats.vhdx.header import Header
from tapfs.formats.vhdx.log_entry import HEADER_BYTES, Change, EntryHeader, parse_changes, parse_header
from tapfs.formats.vhdx.units import MIB, PAGE


class Entry(NamedTuple):
    """A valid entry and its offset in the log."""

    offset: int
    header: EntryHeader


class Log:
    """The log of a file, a ring of sectors."""

    def __init__(self, file: HostFile, header: Header) -> None:
        self._file = file
        self._header = header
        self._length = header.log_length

    def newest_sequence(self) -> list[Entry]:
        """The entries to be replayed, in their order: from the newest one's tail on. Empty if none is valid."""
        valid = {entry.offset: entry for entry in self._valid_entries()}
        followers: dict[int, Entry] = {}
        for entry in valid.values():
            follower = valid.get((entry.offset + entry.header.length) % self._length)
            if follower is not None and follower.header.sequence == entry.header.sequence + 1:
                followers[entry.offset] = follower
        starts = valid.keys() - {follower.offset for follower in followers.values()}
        newest: list[Entry] = []
        for start in starts:
            chain = [valid[start]]
            while (follower := followers.get(chain[-1].offset)) is not None:
                chain.append(follower)
            head = chain[-1].header
            first = next((at for at, entry in enumerate(chain) if entry.offset == head.tail), None)
            if first is not None and (not newest or head.sequence > newest[-1].header.sequence):
                newest = chain[first:]
        return newest

    def changes(self, entry: Entry) -> list[Change]:
        """What a valid entry does, in its order."""
        return self._changes(entry.offset, entry.header) or []

    def _valid_entries(self) -> Iterator[Entry]:
        for piece_at in range(0, self._length, MIB):
            piece = self._file.read(self._header.log_offset + piece_at, MIB)
            for at in range(0, len(piece), PAGE):
                header = parse_header(piece[at : at + HEADER_BYTES], self._header.log, self._length)
                if header is None or len(piece) < at + PAGE:
                    continue
                if self._changes(piece_at + at, header) is not None:
                    yield Entry(piece_at + at, header)

    def _changes(self, offset: int, header: EntryHeader) -> list[Change] | None:
        changes = parse_changes(lambda at, length: self._read((offset + at) % self._length, length), header)
        start, end = self._header.log_offset, self._header.log_end
        if changes is None or any(change.offset < end and start < change.end for change in changes):
            return None
        return changes

    def _read(self, offset: int, length: int) -> bytes:
        """Bytes of one sector."""
        return self._file.read(self._header.log_offset + offset, length)
