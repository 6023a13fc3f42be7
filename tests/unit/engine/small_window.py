"""Raw deflate unpacked by zlib with a window of 4 KiB, as one reader of compressed clusters has it."""

from __future__ import annotations

import zlib


def unpacked(payload: bytes, step: int) -> bytes:
    """The bytes of a stream, `step` of them at a time, so that zlib needs its window for what lies before."""
    unpacker = zlib.decompressobj(-12)
    out = bytearray()
    rest = payload
    while not unpacker.eof:
        part = unpacker.decompress(rest, step)
        assert part or unpacker.eof
        out += part
        rest = unpacker.unconsumed_tail
    assert not unpacker.unused_data
    return bytes(out)
