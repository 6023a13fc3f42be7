"""A disk, or a range of one, as a binary file object, for Python code that reads files."""

from __future__ import annotations

import errno
import io
import os
import threading
from typing import TYPE_CHECKING

from tapfs.errors import ErrorKind, ImageError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

    from tapfs.disk.image import Image

_SEEK_DATA, _SEEK_HOLE = os.SEEK_DATA, os.SEEK_HOLE


class DiskFile(io.RawIOBase):
    """The bytes ``[offset, offset + size)`` of an open disk as a raw binary file of a fixed length.

    It has no buffer: wrap it in `io.BufferedReader` or `io.BufferedRandom` for many small transfers. Several files of
    one disk see each other's writes; each has a position of its own, which threads share. `flush`, and with it `close`,
    make what was written durable. Raises ImageError, which is an OSError, and as every file object ValueError once it
    is closed and `io.UnsupportedOperation` for what its mode does not allow.
    """

    def __init__(self, image: Image, offset: int, size: int, *, owns: bool = False) -> None:
        """A file over a range inside the disk; `Image.open` and `tapfs.open_file` make them.

        With `owns` closing the file closes the image as well.
        """
        super().__init__()
        self._image = image
        self._offset = offset
        self._size = size
        self._owns = owns
        self._position = 0
        self._written = False
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """The image's name as it was opened."""
        return self._image.path

    @property
    def mode(self) -> str:
        """The mode that `open` would have for it."""
        return "rb+" if self._image.writable else "rb"

    @property
    def size(self) -> int:
        """Its length in bytes, which never changes."""
        return self._size

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"mode {self.mode!r}"
        return f"<tapfs.DiskFile of {self.name!r}: {self._size} bytes, {state}>"

    def __del__(self) -> None:
        """Nothing: a file that owns its image leaves the warning, and the closing, to it."""

    def readable(self) -> bool:
        """True, always."""
        self._require_open()
        return True

    def writable(self) -> bool:
        """Whether the image was opened for writing."""
        self._require_open()
        return self._image.writable

    def seekable(self) -> bool:
        """True, always."""
        self._require_open()
        return True

    def tell(self) -> int:
        """The position in bytes from the start of the file."""
        self._require_open()
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Change the position and return it; it may lie behind the end.

        With `os.SEEK_DATA` it becomes the next place that is not known to read as zeros, with `os.SEEK_HOLE` the next
        that is, or the end. As for other files an OSError with ENXIO says that there is none.
        """
        self._require_open()
        with self._lock:
            match whence:
                case os.SEEK_SET:
                    position = offset
                case os.SEEK_CUR:
                    position = self._position + offset
                case os.SEEK_END:
                    position = self._size + offset
                case _ if whence in (_SEEK_DATA, _SEEK_HOLE):
                    position = self._next(offset, zero=whence == _SEEK_HOLE)
                case _:
                    raise ValueError(f"invalid whence ({whence})")
            if position < 0:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), self.name)
            self._position = position
            return position

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Read up to the length of `buffer` into it; fewer bytes only at the end, where it returns 0."""
        self._require_open()
        with self._lock, memoryview(buffer).cast("B") as view:
            count = max(0, min(len(view), self._size - self._position))
            if count:
                self._image.read_into(self._offset + self._position, view[:count])
            self._position += count
            return count

    def read(self, size: int | None = -1, /) -> bytes:
        """Up to `size` bytes, or all that are left; fewer only at the end."""
        self._require_open()
        left = max(0, self._size - self._position)
        buffer = bytearray(left if size is None or size < 0 else min(size, left))
        return bytes(buffer[: self.readinto(buffer)])

    def readall(self) -> bytes:
        """All bytes from the position to the end."""
        return self.read()

    def write(self, data: ReadableBuffer, /) -> int:
        """Write at the position and return how many bytes were written: fewer than given at the end of the file.

        Raises ImageError(no_space) if there is no room for any.
        """
        self._require_open()
        if not self._image.writable:
            raise io.UnsupportedOperation("not writable")
        with self._lock, memoryview(data).cast("B") as view:
            count = max(0, min(len(view), self._size - self._position))
            if len(view) > 0 and count == 0:
                raise ImageError(
                    ErrorKind.NO_SPACE,
                    f"the disk, or partition, ends at byte {self._size} and does not grow",
                    path=self.name,
                    offset=self._position,
                    op="write",
                )
            if count:
                self._written = True
                self._image.write(self._offset + self._position, view[:count])
                self._position += count
            return count

    def truncate(self, size: int | None = None, /) -> int:
        """Refused unless it changes nothing: a disk has a fixed length."""
        self._require_open()
        if (self._position if size is None else size) != self._size:
            raise io.UnsupportedOperation("a disk has a fixed length")
        return self._size

    def flush(self) -> None:
        """Make what was written through this file durable."""
        self._require_open()
        if self._written and not self._image.closed:  # closing the image has flushed it
            self._image.flush()
            self._written = False

    def close(self) -> None:
        """Flush what was written, and close the image if the file owns it; closing twice is allowed."""
        if self.closed:
            return
        try:
            super().close()
        finally:
            if self._owns:
                self._image.close()

    def _require_open(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file")

    def _next(self, offset: int, *, zero: bool) -> int:
        """The first place from `offset` on that is known to read as zeros, or that is not."""
        if not 0 <= offset < self._size:
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO), self.name)
        place, end = self._offset + offset, self._offset + self._size
        found = False
        while place < end and not found:
            place, found = self._image.disk_map.search(place, end, data=not zero)
        if found or zero:
            return place - self._offset
        raise OSError(errno.ENXIO, os.strerror(errno.ENXIO), self.name)


def file_of(image: Image, partition: int | None, *, owns: bool = False, sector_size: int | None = None) -> DiskFile:
    """A file over the whole disk, or over the partition with that number. Raises ImageError(not_found)."""
    if partition is None:
        return DiskFile(image, 0, image.size, owns=owns)
    partitions = [each for each in image.contents(sector_size=sector_size).table.partitions if not each.container]
    for each in partitions:
        if each.number == partition:
            return DiskFile(image, each.start, each.size, owns=owns)
    there = ", ".join(str(each.number) for each in partitions)
    raise ImageError(
        ErrorKind.NOT_FOUND,
        f"has no partition {partition} with data; " + (f"it has {there}" if there else "it has no partitions"),
        path=image.path,
        op="open the partition",
    )
