"""The conditions under which a qcow2 image is opened, and those under which it is written."""

from __future__ import annotations

from collections.abc import Sequence

from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.qcow2 import extensions as ext
from tapfs.formats.qcow2.header import (
    CORRUPT,
    CRYPT_AES,
    CRYPT_METHOD_AT,
    DIRTY,
    INCOMPATIBLE_AT,
    KNOWN_INCOMPATIBLE,
    REFTABLE_OFFSET_AT,
    Header,
)


def require_features(header: Header, extensions: Sequence[ext.Extension], path: str, *, writable: bool) -> None:
    """Raise ImageError for what the header demands and tapfs cannot do.

    Unsupported: a feature that is unknown, named by the image's own table of names; old encryption, for writing.
    Corrupt: an image that is to be written and says that it is dirty or damaged.
    """
    unknown = header.incompatible & ~KNOWN_INCOMPATIBLE
    if unknown:
        bits = [bit for bit in range(64) if unknown >> bit & 1]
        names = ", ".join(ext.feature_name(extensions, ext.INCOMPATIBLE_FEATURE, bit) for bit in bits)
        raise _refused(f"needs features that tapfs does not know: {names}", path, INCOMPATIBLE_AT)
    if writable and header.crypt_method == CRYPT_AES:
        raise _refused("is encrypted the old way (AES), which tapfs only reads", path, CRYPT_METHOD_AT)
    for bit, what in ((DIRTY, "was not closed after writing"), (CORRUPT, "is marked as corrupt")):
        if writable and header.incompatible & bit:
            raise _damaged(f"{what}: it cannot be written as it is", path, INCOMPATIBLE_AT)


def require_refcount_table(header: Header, file_bytes: int, path: str) -> None:
    """Raise ImageError(corrupt) for an image that is to be written and has no refcount table where one can be.

    A table that lies past the end of the file would read as zeros, so that all clusters were free.
    """
    place = header.reftable_offset
    outside = place + header.reftable_length > file_bytes
    if header.reftable_clusters == 0 or place % header.cluster_size or not place or outside:
        raise _damaged(f"the refcount table at {place:#x} cannot be there", path, REFTABLE_OFFSET_AT)


def _refused(message: str, path: str, offset: int) -> ImageError:
    return ImageError(ErrorKind.UNSUPPORTED, message, path=path, offset=offset, op="open")


def _damaged(message: str, path: str, offset: int) -> ImageError:
    return ImageError(ErrorKind.CORRUPT, message, path=path, offset=offset, op="open", remedy="run tapfs repair")
