"""The bitmap before each block of a VHD, one bit for each sector that the block has.

docs/specs/vhd.md, "The sector bitmap". The most significant bit of a byte is the first. Tapdisk 0.1 had the least
significant bit first.
"""

from __future__ import annotations

from collections.abc import Iterator

from tapfs.patterns import pattern
from tapfs.records import NamedTuple

_RUNS = pattern(r"1+|0+")

#: Each byte with its bits turned round.
_TURNED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


class SectorRun(NamedTuple):
    """The sectors ``[first, stop)`` of a block, all of them there or none."""

    first: int
    stop: int
    present: bool


def turned(raw: bytes) -> bytes:
    """A bitmap with the bits of each byte in the other order."""
    return raw.translate(_TURNED)


def is_full(raw: bytes | bytearray, sectors: int) -> bool:
    """Whether the first `sectors` bits, a multiple of 8, are all set."""
    return raw.count(0xFF, 0, sectors // 8) == sectors // 8


def sector_runs(raw: bytes | bytearray, first: int, stop: int) -> Iterator[SectorRun]:
    """The runs of equal bits among those of the sectors ``[first, stop)``."""
    low, high = first // 8, -(-stop // 8)
    bits = f"{int.from_bytes(raw[low:high], 'big'):0{8 * (high - low)}b}"
    for run in _RUNS.finditer(bits, first - 8 * low, stop - 8 * low):
        yield SectorRun(8 * low + run.start(), 8 * low + run.end(), run[0].startswith("1"))


def set_bits(raw: bytearray, first: int, stop: int) -> None:
    """Set the bits of the sectors ``[first, stop)``."""
    low, high = first // 8, -(-stop // 8)
    count = stop - first
    bits = ((1 << count) - 1) << (8 * high - stop)
    raw[low:high] = (int.from_bytes(raw[low:high], "big") | bits).to_bytes(high - low, "big")
