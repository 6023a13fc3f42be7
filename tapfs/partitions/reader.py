"""Reading a few places of a virtual disk, each page once."""

from __future__ import annotations

from collections.abc import Callable

#: Reads exactly `length` bytes at a byte offset; the range lies inside the disk.
Read = Callable[[int, int], bytes]

_PAGE = 4096


class Reader:
    """A window of a disk. What the parsers ask for overlaps, so pages are kept."""

    def __init__(self, read: Read, size: int) -> None:
        self.size = size
        self._read = read
        self._start = 0
        self._disk_size = size
        self._pages: dict[int, bytes] = {}

    def window(self, start: int, size: int) -> Reader:
        """The range ``[start, start + size)``, which lies inside this one."""
        inner = Reader(self._read, size)
        inner._start = self._start + start
        inner._disk_size = self._disk_size
        inner._pages = self._pages
        return inner

    def read_once(self, offset: int, length: int) -> bytes:
        """As `read`, for what nobody asks for again: nothing is kept."""
        end = min(offset + length, self.size)
        return b"" if offset < 0 or offset >= end else self._read(self._start + offset, end - offset)

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes at `offset`, shorter only at the end of the window.

        Raises the ImageError of the disk.
        """
        end = min(offset + length, self.size)
        if offset < 0 or offset >= end:
            return b""
        start, stop = self._start + offset, self._start + end
        first, last = start // _PAGE, (stop - 1) // _PAGE
        if first < last:
            return self._read(start, stop - start)
        if first not in self._pages:
            page = first * _PAGE
            self._pages[first] = self._read(page, min(_PAGE, self._disk_size - page))
        return self._pages[first][start - first * _PAGE : stop - first * _PAGE]
