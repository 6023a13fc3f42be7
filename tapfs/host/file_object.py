"""File objects as host files: an object of Python that reads, as a sparse local copy that has what was read of it."""

from __future__ import annotations

import io
import itertools
import os
import threading
from collections import deque
from contextlib import ExitStack, suppress
from typing import Protocol, cast, runtime_checkable

from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.host.copied import CopiedFile, Copy, Shared
from tapfs.host.presence import Ended, Presence
from tapfs.host.scratch import unnamed_descriptor

#: The copy is kept in blocks of so many bytes, or in larger ones where they would be more than the other number.
_BLOCK_BYTES = 64 << 10
_MOST_BLOCKS = 4 << 20

_numbers = itertools.count(1)


@runtime_checkable
class ReadableFile(Protocol):
    """A binary file that reads at a position: what `open(path, "rb")`, io, zipfile and fsspec give."""

    def read(self, size: int = -1, /) -> bytes:
        """Up to `size` bytes at the position, which moves on; none at the end only."""
        ...

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Move the position."""
        ...


@runtime_checkable
class PositionedFile(Protocol):
    """A binary file that reads anywhere, from several threads at once."""

    def pread(self, size: int, offset: int, /) -> bytes:
        """Up to `size` bytes at the offset; none at the end only."""
        ...


@runtime_checkable
class LaterFile(Protocol):
    """A file that is still to be opened, as `fsspec.open` gives it."""

    def open(self) -> object:
        """Open it."""
        ...


def object_file(source: object) -> CopiedFile:
    """An open file object as a host file of which not everything is here.

    The object stays the caller's, and must neither change nor be used by others. One that has to be opened is closed.
    Raises ImageError, TypeError for what is no binary file.
    """
    opened: object | None = None
    if not isinstance(source, ReadableFile | PositionedFile) and isinstance(source, LaterFile):
        source = opened = source.open()
    with ExitStack() as on_error:
        on_error.callback(_close, opened)
        carrier = _Carrier(source)
        carrier.copy = unnamed_descriptor("make a local copy of a file object")
        on_error.callback(os.close, carrier.copy)
        try:
            os.ftruncate(carrier.copy, carrier.size)
        except OSError as error:
            raise from_os_error(error, path=carrier.name, op="make a local copy") from error
        on_error.pop_all()
    block = _BLOCK_BYTES
    while carrier.size > block * _MOST_BLOCKS:
        block *= 2
    # What is read ahead would keep who reads waiting: nothing is fetched in another thread.
    presence = Presence(block, carrier.size, carrier, ahead=False)
    copy = Copy(carrier.copy, _Object(carrier, opened), place=((-2, next(_numbers)), 0), presence=presence)
    return CopiedFile(carrier.name, Shared(copy))


def _close(opened: object | None) -> None:
    if opened is not None:
        with suppress(Exception):
            cast("io.IOBase", opened).close()


class _Object:
    """A file object: a `tapfs.host.copied.Origin`. `opened` was opened here, and is closed."""

    def __init__(self, carrier: _Carrier, opened: object | None) -> None:
        self._carrier = carrier
        self._opened = opened

    def allocated_size(self) -> int:
        """The length: nobody says how much of it is held where it lies."""
        return self._carrier.size

    def modified_seconds(self) -> int:
        """Unknown, so 0."""
        return 0

    def real_path(self) -> str:
        """The name of the object."""
        return self._carrier.name

    def close(self) -> None:
        """Close what was opened here."""
        opened, self._opened = self._opened, None
        _close(opened)


class _Carrier:
    """Brings bytes of a file object into the copy when it is waited for: a `tapfs.host.presence.Carrier`."""

    def __init__(self, source: object) -> None:
        name: object = getattr(source, "name", None) or getattr(source, "path", None)
        self.name = name if isinstance(name, str) else f"<{type(source).__name__}>"
        self.copy = -1
        self._source = source
        self._lock = threading.Lock()
        self._begun: deque[tuple[int, int, int]] = deque()
        self._number = 0
        if not isinstance(source, ReadableFile | PositionedFile):
            message = f"{type(source).__name__} is no name and no binary file: it has neither read and seek nor pread"
            raise TypeError(message)
        self.size = self._length()

    def begin(self, offset: int, length: int) -> int:
        """See `tapfs.host.presence.Carrier.begin`."""
        self._number += 1
        self._begun.append((self._number, offset, length))
        return self._number

    def ended(self) -> list[Ended]:
        """See `tapfs.host.presence.Carrier.ended`."""
        number, offset, length = self._begun.popleft()
        error: ImageError | None = None
        try:
            self._bring(offset, length)
        except ImageError as failed:
            error = failed
        return [Ended(number, error)]

    def give_up(self, offset: int, length: int) -> None:
        """Nothing is given up: the copy has no bound."""
        raise AssertionError((offset, length))

    def _bring(self, offset: int, length: int) -> None:
        end = offset + length
        while offset < end:
            data = self._read(offset, end - offset)
            if not data:
                message = f"ends at byte {offset}, and was {self.size} bytes long when it was opened"
                raise ImageError(ErrorKind.IO, message, path=self.name, offset=offset, op="read")
            view = memoryview(data)[: end - offset]
            while view:
                try:
                    written = os.pwrite(self.copy, view, offset)
                except OSError as error:
                    raise from_os_error(error, path=self.name, op="write to the local copy") from error
                view = view[written:]
                offset += written

    def _read(self, offset: int, length: int) -> bytes:
        try:
            data = self._answer(offset, length)
        except Exception as error:
            raise self._failed(error, offset) from error
        if not isinstance(data, bytes | bytearray | memoryview):
            message = "gives text and no bytes: open it as binary" if isinstance(data, str) else "gives no bytes"
            raise ImageError(ErrorKind.INVALID_ARGUMENT, message, path=self.name, op="read")
        return bytes(cast("bytes", data))

    def _answer(self, offset: int, length: int) -> object:
        """What the object gives, whatever that is."""
        if isinstance(self._source, PositionedFile):
            return self._source.pread(length, offset)
        source = cast("ReadableFile", self._source)
        with self._lock:
            source.seek(offset)
            return source.read(length)

    def _length(self) -> int:
        size: object = getattr(self._source, "size", None)
        size = size() if callable(size) else size
        if isinstance(size, int) and size >= 0:
            return size
        if not isinstance(self._source, ReadableFile):
            raise TypeError(f"{type(self._source).__name__} has neither a size nor seek, which would tell it")
        try:
            found = cast("object", self._source.seek(0, os.SEEK_END))  # some give nothing
            return found if isinstance(found, int) else int(cast("io.IOBase", self._source).tell())
        except Exception as error:
            raise self._failed(error, None) from error

    def _failed(self, error: Exception, offset: int | None) -> ImageError:
        if isinstance(error, ImageError):
            return error
        message = f"cannot be read: {str(error) or type(error).__name__}"
        return ImageError(ErrorKind.IO, message, path=self.name, offset=offset, op="read")
