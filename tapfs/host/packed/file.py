"""A packed file as the file that it holds: a scratch file that is filled as far as somebody reads.

What can be unpacked in parts is unpacked where it is read (`tapfs.host.packed.units`). Else everything before a place
that is read is unpacked first, in one pass. Where nothing says how long the contents are, that pass is made at once.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.host.copied import CopiedFile, Copy, Shared
from tapfs.host.file import LocalFile
from tapfs.host.packed.bound import most_bytes, too_much
from tapfs.host.packed.units import Index, Unit, unpack_xz_unit, unpack_zstd_unit, xz_index, zstd_index
from tapfs.host.presence import Ended, Presence
from tapfs.host.scratch import unnamed_descriptor

if TYPE_CHECKING:
    import zstandard

_OPERATION = "unpack"
#: Larger contents than this are no disk.
_MOST_BYTES = 1 << 47
_PIECE_BYTES = 1 << 20
#: So much of a Zstandard file is unpacked at a time: it may hold 32,768 times as much.
_FRAME_BYTES = 4 << 10
#: The contents leave so many bytes of the scratch file's file system free.
_LEFT_FREE = 1 << 30
#: Zeros of whole pieces of so many bytes become holes.
_HOLE_BYTES = 64 << 10
_ZEROS = bytes(_HOLE_BYTES)
#: Contents that come in one pass are marked as present in blocks of so many bytes, or in larger ones if they are more.
_BLOCK_BYTES = 1 << 20
_MOST_BLOCKS = 1 << 20

#: The errors of the libraries for damaged contents.
_DAMAGE = (lzma.LZMAError, zlib.error, gzip.BadGzipFile, EOFError, ValueError)


def unpacked(packed: LocalFile, kind: str) -> CopiedFile:
    """What a file holds that is packed as `kind`: gzip, bzip2, xz or zstd; read-only. The file is taken over.

    Raises ImageError: corrupt, no_space, unsupported, also for more than is unpacked in one pass (`bound`).
    """
    try:
        scratch = unnamed_descriptor(_OPERATION)
    except BaseException:
        packed.close()
        raise
    try:
        presence = _filled(packed, kind, scratch)
    except BaseException:
        os.close(scratch)
        packed.close()
        raise
    copy = Copy(scratch, packed, place=packed.place, presence=presence)
    copy.packing = kind
    return CopiedFile(packed.path, Shared(copy))


def _filled(packed: LocalFile, kind: str, scratch: int) -> Presence | None:
    """Have the scratch file as long as the contents, and what brings these into it; None: they are all there."""
    with told(packed.path):
        target = Scratch(scratch)
        index = _index_of(packed, kind)
        if index is not None:
            if index.size > _MOST_BYTES:
                message = f"says that it holds {index.size} bytes, and no disk is as long"
                raise ImageError(ErrorKind.CORRUPT, message, path=packed.path, op=_OPERATION)
            os.ftruncate(scratch, index.size)
            unit_bytes = index.unit_bytes
            if unit_bytes is not None:
                carrier = _Units(packed, target, index, unit_bytes, _unpacker(kind))
                return Presence(unit_bytes, index.size, carrier, ahead=False)
        if index is not None:
            block = max(_BLOCK_BYTES, -(-index.size // _MOST_BLOCKS // _BLOCK_BYTES) * _BLOCK_BYTES)
            most = most_bytes(packed.size())
            contents = _Pass(packed.path, partial(_stream, packed, kind, index), target, index.size, most)
            return Presence(block, index.size, contents, ahead=False)
        stream, most = _stream(packed, kind, index), most_bytes(packed.size())
        length = 0
        while piece := stream.read(_PIECE_BYTES):
            target.put(piece, length)
            length += len(piece)
            if most is not None and length > most:
                raise too_much(packed.path, most)
        os.ftruncate(scratch, length)
        return None


def _index_of(packed: LocalFile, kind: str) -> Index | None:
    if kind == "xz":
        return xz_index(packed.read, packed.size(), packed.path)
    return zstd_index(packed.read, packed.size(), packed.path) if kind == "zstd" else None


def _unpacker(kind: str) -> Callable[[Unit, bytes], bytes]:
    if kind == "xz":
        return unpack_xz_unit
    return partial(unpack_zstd_unit, _zstandard())


def _stream(packed: LocalFile, kind: str, index: Index | None) -> _Stream:
    """The contents from their start."""
    if kind == "xz" and index is not None:
        return _Streams(packed, index.streams)
    source = io.BufferedReader(_Reader(packed, 0, packed.size()), _PIECE_BYTES)
    if kind == "gzip":
        return gzip.GzipFile(fileobj=source)
    return bz2.BZ2File(source) if kind == "bzip2" else _Frames(source)


def _zstandard() -> zstandard.ZstdDecompressor:
    try:
        import zstandard as library
    except ImportError as error:
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            "is a Zstandard file, and the Python package zstandard is not installed",
            op=_OPERATION,
            remedy="pip install 'tapfs[zstd]', or unpack it with unzstd",
        ) from error
    return library.ZstdDecompressor()


class _Stream(Protocol):
    """Contents that come in order."""

    def read(self, size: int, /) -> bytes:
        """Some of them; nothing at their end."""
        ...


class _Reader(io.RawIOBase):
    """Bytes ``[start, end)`` of a host file, which may lie elsewhere."""

    def __init__(self, file: LocalFile, start: int, end: int) -> None:
        super().__init__()
        self._file = file
        self._at = start
        self._end = end

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:  # a writable buffer, which typeshed has no public name for
        """Read on."""
        content = self._file.read(self._at, min(len(buffer), self._end - self._at))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


class _Streams:
    """What several xz streams hold, one behind the other."""

    def __init__(self, packed: LocalFile, streams: Sequence[tuple[int, int]]) -> None:
        self._packed = packed
        self._left = iter(streams)
        self._stream: lzma.LZMAFile | None = None

    def read(self, size: int, /) -> bytes:
        """See :class:`_Stream`."""
        while True:
            if self._stream is None:
                # One at a time: a file may have many, and each has its memory.
                place = next(self._left, None)
                if place is None:
                    return b""
                packed = io.BufferedReader(_Reader(self._packed, *place), _PIECE_BYTES)
                self._stream = lzma.LZMAFile(packed)  # noqa: SIM115  it closes nothing
            if piece := self._stream.read(size):
                return piece
            self._stream = None


class _Frames:
    """What the frames of a Zstandard file hold, each of which must come to its end."""

    def __init__(self, source: io.BufferedReader[Any]) -> None:
        self._source = source
        self._decompressor = _zstandard()
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._rest = b""

    def read(self, size: int, /) -> bytes:
        """See :class:`_Stream`; it may be more than `size`."""
        del size
        while packed := self._rest or self._source.read(_FRAME_BYTES):
            self._rest = b""
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            piece = self._frame.decompress(packed)
            if self._frame.eof:
                self._rest = self._frame.unused_data
                self._frame = None
            if piece:
                return piece
        if self._frame is not None:
            raise EOFError("the last frame is not complete")
        return b""


class Queue:
    """A :class:`tapfs.host.presence.Carrier` that brings one range after the other, in the thread that waits."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._waiting: list[tuple[int, int, int]] = []
        self._count = 0

    def begin(self, offset: int, length: int) -> int:
        """See :class:`tapfs.host.presence.Carrier`."""
        self._count += 1
        self._waiting.append((self._count, offset, length))
        return self._count

    def ended(self) -> list[Ended]:
        """See :class:`tapfs.host.presence.Carrier`."""
        number, offset, length = self._waiting.pop(0)
        try:
            with told(self._path):
                self._bring(offset, length)
        except ImageError as error:
            return [Ended(number, error)]
        return [Ended(number, None)]

    def give_up(self, offset: int, length: int) -> None:
        """Nothing is given up: the scratch file keeps what was unpacked."""

    def _bring(self, offset: int, length: int) -> None:
        raise NotImplementedError


class _Units(Queue):
    """Brings whole units."""

    def __init__(
        self,
        packed: LocalFile,
        scratch: Scratch,
        index: Index,
        unit_bytes: int,
        unpack: Callable[[Unit, bytes], bytes],
    ) -> None:
        super().__init__(packed.path)
        self._scratch = scratch
        self._packed = packed
        self._index = index
        self._unit_bytes = unit_bytes
        self._unpack = unpack

    def _bring(self, offset: int, length: int) -> None:
        for number in range(offset // self._unit_bytes, -(-(offset + length) // self._unit_bytes)):
            unit = self._index.units[number]
            content = self._unpack(unit, self._packed.read(unit.offset, unit.length))
            if len(content) != unit.unpacked:
                message = f"a unit holds {len(content)} bytes and not {unit.unpacked}, as the index says"
                raise ImageError(ErrorKind.CORRUPT, message, path=self._path, offset=unit.offset, op=_OPERATION)
            self._scratch.put(content, number * self._unit_bytes)


class _Pass(Queue):
    """Brings everything up to a place, in one pass, which starts anew after a failure that may be over."""

    def __init__(
        self, path: str, start: Callable[[], _Stream], scratch: Scratch, size: int, most: int | None = None
    ) -> None:
        super().__init__(path)
        self._most = most
        self._scratch = scratch
        self._start = start
        self._stream: _Stream | None = None
        self._size = size
        self._at = self._put = 0
        self._failed: Exception | None = None

    def _bring(self, offset: int, length: int) -> None:
        if self._failed is not None:
            raise self._failed.with_traceback(None)
        if self._most is not None and offset + length > self._most:
            raise too_much(self._path, self._most)
        try:
            self._pass(offset + length)
        except ImageError:
            # The packed file could not be read. What the libraries had read before that may be lost in them.
            self._stream, self._at = None, 0
            raise
        except Exception as error:
            # The stream may be further than the scratch file, so what follows has no known place any more.
            self._failed = error
            raise

    def _pass(self, stop: int) -> None:
        if self._stream is None:
            self._stream = self._start()
        while self._at < stop:
            piece = self._stream.read(_PIECE_BYTES)
            if not piece:
                raise EOFError("the contents are shorter than the index says")
            if self._at + len(piece) > self._size:
                raise ValueError("the contents are longer than the index says")
            if self._at + len(piece) > self._put:
                self._scratch.put(piece, self._at)
                self._put = self._at + len(piece)
            self._at += len(piece)
        # The checksum of the contents may lie behind their last byte.
        if self._at == self._size and self._stream.read(1):
            raise ValueError("the contents are longer than the index says")


class Scratch:
    """The scratch file, which leaves some of its file system free: a small file may hold more than any disk."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        status = os.fstatvfs(descriptor)
        self._room = status.f_bavail * status.f_frsize - _LEFT_FREE

    def put(self, content: bytes, offset: int) -> None:
        """Write what is not zeros. Raises OSError(ENOSPC)."""
        with memoryview(content) as view:
            for start in range(0, len(content), _HOLE_BYTES):
                part = view[start : start + _HOLE_BYTES]
                if content.startswith(_ZEROS[: len(part)], start):
                    continue
                self._room -= len(part)
                if self._room < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                at = offset + start
                while part:
                    written = os.pwrite(self._descriptor, part, at)
                    part, at = part[written:], at + written


@contextmanager
def told(path: str) -> Generator[None]:
    """Have what a library or the host raises be an ImageError of the packed file."""
    try:
        yield
    except ImageError as error:
        error.path = error.path or path
        raise
    except _DAMAGE as error:
        raise ImageError(ErrorKind.CORRUPT, f"cannot be unpacked: {error}", path=path, op=_OPERATION) from error
    except OSError as error:
        if error.errno is None:  # bz2 raises such
            raise ImageError(ErrorKind.CORRUPT, f"cannot be unpacked: {error}", path=path, op=_OPERATION) from error
        failed = from_os_error(error, path=path, op=_OPERATION)
        if failed.kind is ErrorKind.NO_SPACE:
            failed.remedy = "set TMPDIR to a folder with more space, or unpack it there"
        raise failed from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "zstandard":
            raise
        raise ImageError(ErrorKind.CORRUPT, f"cannot be unpacked: {error}", path=path, op=_OPERATION) from error
