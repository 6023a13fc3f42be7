"""Standard input as the file of an image: as it is where it is a file, else copied to one without a name.

An image is read in any order, and a pipe is not. Pieces of zeros become holes of the copy.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.host.scratch import scratch_folder, unnamed_descriptor

#: The name that means standard input, and how messages call it.
NAME = "-"

_DESCRIPTOR = 0
_OPERATION = "read standard input"
_READ_BYTES = 1 << 20
#: Zeros of whole pieces of so many bytes become holes.
_HOLE_BYTES = 64 << 10
_ZEROS = bytes(_HOLE_BYTES)
#: A copy without a limit of its own leaves so many bytes of its file system free.
_LEFT_FREE = 1 << 30

#: The descriptor of the file that `take` has made ready.
_taken: int | None = None


def take(limit: int | None, on_copy: Callable[[str], None]) -> None:
    """Make standard input ready to be opened, once; `on_copy` is told the folder where a copy of it will lie.

    `limit` is the most bytes that are copied (None: what is free in that folder, but for 1 GiB). Raises ImageError.
    """
    global _taken  # noqa: PLW0603  a process has one standard input
    if _taken is not None:
        raise ImageError(ErrorKind.INVALID_ARGUMENT, "standard input can be read once", path=NAME, op="open")
    if is_whole_file():
        _taken = _DESCRIPTOR
        return
    folder = scratch_folder()
    on_copy(folder)
    copy = unnamed_descriptor(_OPERATION)
    try:
        _copy(copy, _free_bytes(copy) if limit is None else limit, folder)
    except OSError as error:
        os.close(copy)
        raise from_os_error(error, path=folder, op=_OPERATION) from error
    except BaseException:
        os.close(copy)
        raise
    _taken = copy


def taken_path() -> str | None:
    """A path of the file, once `take` has made it ready."""
    return None if _taken is None else f"/proc/self/fd/{_taken}"


def give_back() -> None:
    """Forget what was taken; the space of a copy is free once nobody has it open."""
    global _taken  # noqa: PLW0603  see `take`
    if _taken is not None and _taken != _DESCRIPTOR:
        os.close(_taken)
    _taken = None


def is_whole_file() -> bool:
    """Whether standard input is a file of which nothing was read, or a block device."""
    try:
        mode = os.fstat(_DESCRIPTOR).st_mode
        return (stat.S_ISREG(mode) or stat.S_ISBLK(mode)) and os.lseek(_DESCRIPTOR, 0, os.SEEK_CUR) == 0
    except OSError as error:
        raise from_os_error(error, path=NAME, op=_OPERATION) from error


def _free_bytes(descriptor: int) -> int:
    status = os.statvfs(descriptor)
    return max(0, status.f_bavail * status.f_frsize - _LEFT_FREE)


def _copy(target: int, limit: int, folder: str) -> None:
    length = data = 0
    piece = bytearray(_READ_BYTES)
    while count := _fill(memoryview(piece)):
        with memoryview(piece)[:count] as view:
            for start in range(0, count, _HOLE_BYTES):
                stop = min(start + _HOLE_BYTES, count)
                if not piece.startswith(_ZEROS[: stop - start], start, stop):
                    data += stop - start
                    if data > limit:
                        raise _too_long(limit, folder)
                    _write(target, view[start:stop], length + start)
        length += count
    if not length:
        # The program that should have written has failed, most likely; a disk of no bytes would hide that.
        raise nothing_came()
    os.ftruncate(target, length)


def nothing_came() -> ImageError:
    """The error of a standard input that has ended before its first byte."""
    return ImageError(
        ErrorKind.INVALID_FORMAT,
        "standard input ended before its first byte",
        path=NAME,
        op=_OPERATION,
        remedy="look at what the program before the pipe has said",
    )


def fill(piece: memoryview) -> int:
    """Read standard input until the piece is full or the input ends; the bytes read. Raises ImageError."""
    try:
        return _fill(piece)
    except OSError as error:
        raise from_os_error(error, path=NAME, op=_OPERATION) from error


def _fill(piece: memoryview) -> int:
    done = 0
    while done < len(piece):
        try:
            count = os.readv(_DESCRIPTOR, [piece[done:]])
        except BlockingIOError:
            # The program before the pipe has made it non-blocking, for all who have it.
            from select import select  # few wait

            select([_DESCRIPTOR], [], [])
            continue
        if not count:
            break
        done += count
    return done


def _write(target: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(target, data, offset)
        data, offset = data[written:], offset + written


def _too_long(limit: int, folder: str) -> ImageError:
    return ImageError(
        ErrorKind.NO_SPACE,
        f"more than {limit} bytes of data would be kept in {folder} (without a limit 1 GiB stays free there)",
        path=NAME,
        op=_OPERATION,
        remedy="say a larger {spool_limit}, or set TMPDIR to a folder with more space",
    )
