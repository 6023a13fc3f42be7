"""The head of what a packed file holds: unpacked alone, to see what it is before anything more is unpacked."""

from __future__ import annotations

import bz2
import lzma
import zlib

#: Bytes of a packed file that its head is unpacked from, and bytes that are wanted of the head.
PACKED_BYTES = 256 << 10
HEAD_BYTES = 128 << 10

#: The most memory for a dictionary of xz.
_MOST_MEMORY = 256 << 20


def unpacked_head(kind: str, packed: bytes) -> bytes:
    """The first bytes of what a file holds that begins with `packed`; none where that cannot be unpacked."""
    try:
        match kind:
            case "gzip":
                return zlib.decompressobj(wbits=31).decompress(packed, HEAD_BYTES)
            case "bzip2":
                return bz2.BZ2Decompressor().decompress(packed, HEAD_BYTES)
            case "xz":
                return lzma.LZMADecompressor(memlimit=_MOST_MEMORY).decompress(packed, HEAD_BYTES)
            case _:
                return _zstd_head(packed)
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError):
        return b""


def _zstd_head(packed: bytes) -> bytes:
    try:
        import zstandard
    except ImportError:
        return b""
    import io

    try:
        with zstandard.ZstdDecompressor(max_window_size=_MOST_MEMORY >> 1).stream_reader(io.BytesIO(packed)) as stream:
            return bytes(stream.read(HEAD_BYTES))
    except zstandard.ZstdError:
        return b""
