"""CRC-32C by the processor's instruction: drivers sum by it from the moment on that the engine is loaded."""

from __future__ import annotations

from tapfs.checksums import use_crc32c
from tapfs.kernel._engine import ffi, lib


def crc32c(data: bytes) -> int:
    """The checksum of the bytes. Only where the processor has the instruction."""
    with ffi.from_buffer(data) as source:
        return int(lib.tapfs_crc32c(source, len(source)))


def use_instruction() -> None:
    """Have drivers sum by it, where the processor has it."""
    if lib.tapfs_has_crc32c():
        use_crc32c(crc32c)
