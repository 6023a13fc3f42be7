"""The marks of a check, set by the engine: drivers mark by it once `use_engine` has been called."""

from __future__ import annotations

from tapfs.kernel._engine import ffi, lib
from tapfs.marking import Marked, use_marking


def mark_units(words: bytes, unit_bits: int, marks: bytearray) -> Marked | None:
    """See `tapfs.marking.mark_units`."""
    greatest = ffi.new("uint64_t *")
    with ffi.from_buffer(words) as source, ffi.from_buffer(marks) as target:
        count = lib.tapfs_mark_units(source, len(words) // 8, unit_bits, target, len(marks), greatest)
    return None if count < 0 else Marked(count, greatest[0])


def use_engine() -> None:
    """Have drivers mark by it."""
    use_marking(mark_units)
