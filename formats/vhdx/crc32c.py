"""The checksum that every structure of VHDX has, inside itself (docs/specs/vhdx.md, "Header section (first 1 MiB)")."""

from __future__ import annotations

from tapfs.checksums import crc32c


def crc32c_without(data: bytes, field: int) -> int:
    """The checksum of a structure whose own 4-byte checksum stands at `field` and counts as zeros."""
    return crc32c(data[:field] + bytes(4) + data[field + 4 :])
