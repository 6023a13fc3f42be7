"""The two reasons for which the free space of a file system is not told, as errors."""

from __future__ import annotations

from tapfs.errors import ErrorKind, ImageError

_OP = "read the free space"


def damaged(message: str) -> ImageError:
    """The error (corrupt) for a file system whose own records contradict each other."""
    return ImageError(ErrorKind.CORRUPT, message, op=_OP)


def unknown(message: str) -> ImageError:
    """The error (unsupported) for a file system that is in order, as far as is known, and not understood in full."""
    return ImageError(ErrorKind.UNSUPPORTED, message, op=_OP)


def require_bytes(found: bytes, length: int, what: str) -> bytes:
    """The bytes, if all of them are there. Raises ImageError(corrupt): the structure reaches out of the partition."""
    if len(found) != length:
        raise damaged(f"{what} lies outside the partition")
    return found


def is_refusal(error: ImageError) -> bool:
    """Whether it is one of these two errors: the file system's, and not that of the image or the host."""
    return error.op == _OP
