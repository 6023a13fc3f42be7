"""A search for the files that lie in ranges of a file system, with what was found and what could not be read.

The file system may be damaged, in use or hostile. So nothing that it says is trusted: each loop is bounded, and what
cannot be read or makes no sense becomes a note.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Range, merge_runs
from tapfs.partitions.reader import Reader

#: Notes that are kept; a spoiled file system has as many faults as blocks.
_MOST_NOTES = 20
#: Names of one file that are told; it may have thousands of links.
_MOST_NAMES = 8
#: Directories and steps of one chain that are looked at.
MOST_DIRECTORIES = 1 << 20


class Owner(NamedTuple):
    """A file, or a record of the file system's own, and the range of the partition that it has of those looked for.

    `names` are paths; none where no directory names it. `number` is that of the inode or record, None for what has
    none. `part`: "data", "directory", "map" (of a file), "inode" (its own record), "metadata" (of the file system).
    """

    range: Range
    part: str
    number: int | None
    names: tuple[str, ...]


class Search:
    """What is looked for in one file system, whose bytes come from `disk`; `wanted` ascends and does not overlap."""

    def __init__(self, disk: Reader, wanted: Sequence[Range]) -> None:
        self.disk = disk
        self.notes: list[str] = []
        self._wanted = wanted
        self._hits: dict[int, set[tuple[Range, str]]] = {}
        self._names: dict[int, list[str]] = {}
        self._metadata: list[Owner] = []
        self._untold = 0

    # What readers of file systems say

    def read(self, offset: int, length: int, what: str) -> bytes | None:
        """All bytes of a range, or None and a note."""
        try:
            found = self.disk.read_once(offset, length)
        except ImageError as error:
            if error.kind not in {ErrorKind.IO, ErrorKind.CORRUPT}:
                raise
            self.note(f"{what} cannot be read: {error.message}")
            return None
        if len(found) != length or offset < 0:
            self.note(f"{what} would lie outside the partition")
            return None
        return found

    def note(self, text: str) -> None:
        """Say what was not understood or could not be read."""
        if text in self.notes:
            return
        if len(self.notes) < _MOST_NOTES:
            self.notes.append(text)
        else:
            self._untold += 1

    def file_has(self, number: int, offset: int, length: int, part: str) -> None:
        """The file with that number has a range of the partition."""
        for hit in self.hits(offset, length):
            self._hits.setdefault(number, set()).add((hit, part))

    def metadata_has(self, name: str, offset: int, length: int) -> None:
        """The file system has a range for itself, and calls it by a name."""
        self._metadata += [Owner(hit, "metadata", None, (name,)) for hit in self.hits(offset, length)]

    def named(self, number: int, path: str) -> None:
        """A directory names the file with that number."""
        if number in self._hits:
            names = self._names.setdefault(number, [])
            if len(names) < _MOST_NAMES and path not in names:
                names.append(path)

    @property
    def unnamed(self) -> set[int]:
        """The numbers of files that were hit and have no name yet."""
        return self._hits.keys() - self._names.keys()

    def hits(self, offset: int, length: int) -> Iterator[Range]:
        """The parts of a range that are looked for."""
        at = max(bisect_right(self._wanted, offset, key=lambda each: each.offset) - 1, 0)
        end = offset + length
        for index in range(at, len(self._wanted)):
            each = self._wanted[index]
            if each.offset >= end:
                return
            start, stop = max(offset, each.offset), min(end, each.end)
            if start < stop:
                yield Range(start, stop - start)

    # What comes of it

    def owners(self) -> list[Owner]:
        """All that was found, in the order of the partition."""
        found = list(self._metadata)
        for number, hits in self._hits.items():
            names = tuple(sorted(self._names.get(number, ())))
            for part in sorted({part for _, part in hits}):
                if part == "inode" and not names:
                    continue  # the record of no file
                ranges = sorted(hit for hit, of in hits if of == part)
                found += [Owner(hit, part, number, names) for hit in merge_runs(ranges, _joined)]
        if self._untold:
            self.notes.append(f"and {self._untold} further faults")
            self._untold = 0
        return sorted(found, key=lambda each: (each.range, each.part, each.names))


def text_of(name: bytes) -> str:
    """A name of a file system that keeps bytes."""
    return name.decode("utf-8", "surrogateescape")


def _joined(left: Range, right: Range) -> Range | None:
    return Range(left.offset, max(left.end, right.end) - left.offset) if left.end >= right.offset else None
