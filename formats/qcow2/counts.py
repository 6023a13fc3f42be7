"""The numbers in a refcount block of qcow2, of 1 to 64 bits each (QEMU's docs/interop/qcow2, "Reference counting").

Numbers below 8 bits fill a byte from its least significant bit. A block is handled as the bytes that stand on the disk.
"""

from __future__ import annotations

import sys
from array import array
from functools import cache, reduce

_TYPECODES = {3: "B", 4: "H", 5: "I", 6: "Q"}
_BYTE_ORDER = 3

#: Translations of bytes: 1 to 1 and all else to 0, all but 0 to 255, each to its opposite.
_ONLY_ONE = bytes(number == 1 for number in range(256))
_ALL_BITS = bytes(0xFF if number else 0 for number in range(256))
_INVERTED = bytes(0xFF - number for number in range(256))


@cache
def _spread(order: int) -> tuple[bytes, ...]:
    """For each byte the numbers in it, as bytes."""
    per_byte, mask = 8 >> order, (1 << (1 << order)) - 1
    return tuple(bytes(byte >> (slot << order) & mask for slot in range(per_byte)) for byte in range(256))


@cache
def _shifted(bits: int) -> bytes:
    """A translation of bytes: each moved up by so many bits."""
    return bytes(byte << bits & 0xFF for byte in range(256))


class Counting:
    """How refcounts of ``2 ** order`` bits stand in a block."""

    def __init__(self, order: int) -> None:
        #: A count has ``2 ** order`` bits.
        self.order = order
        self.largest = (1 << (1 << order)) - 1
        #: Bytes of one number; 0 where several share a byte.
        self._width = (1 << order) // 8

    def get(self, raw: bytes | bytearray | array[int], index: int) -> int:
        """The number at an index."""
        width = self._width
        if width:
            return int.from_bytes(bytes(raw[index * width : (index + 1) * width]), "big")
        at, shift = self._place(index)
        return raw[at] >> shift & self.largest

    def put(self, raw: array[int], index: int, number: int) -> None:
        """Set the number at an index."""
        width = self._width
        if width:
            raw[index * width : (index + 1) * width] = array("B", number.to_bytes(width, "big"))
            return
        at, shift = self._place(index)
        raw[at] = raw[at] & ~(self.largest << shift) & 0xFF | number << shift

    def fill(self, raw: array[int], index: int, count: int, old: int, new: int) -> bool:
        """Turn `count` numbers from `index` on from `old` into `new`, if all of them are `old`."""
        width = self._width
        if not width:
            return False
        start, stop = index * width, (index + count) * width
        if raw[start:stop] != array("B", old.to_bytes(width, "big") * count):
            return False
        raw[start:stop] = array("B", new.to_bytes(width, "big") * count)
        return True

    def byte_range(self, index: int, count: int) -> tuple[int, int]:
        """The bytes of the block that hold these numbers, ``[start, stop)``."""
        if self._width:
            return index * self._width, (index + count) * self._width
        return index << self.order >> 3, ((index + count - 1) << self.order >> 3) + 1

    def numbers(self, raw: bytes) -> array[int]:
        """All numbers of a block."""
        if self.order < _BYTE_ORDER:
            return array("B", self._spread_out(raw))
        numbers = array(_TYPECODES[self.order], raw)
        if sys.byteorder == "little" and self._width > 1:
            numbers.byteswap()
        return numbers

    def packed(self, numbers: array[int]) -> bytes:
        """The block of these numbers, none of which is larger than the largest."""
        if self.order < _BYTE_ORDER:
            per_byte, narrow = 8 >> self.order, array("B", numbers).tobytes()
            parts = [narrow[slot::per_byte].translate(_shifted(slot << self.order)) for slot in range(per_byte)]
            return reduce(_either, parts)
        found = array(_TYPECODES[self.order], numbers)
        if sys.byteorder == "little" and self._width > 1:
            found.byteswap()
        return found.tobytes()

    def capped(self, raw: bytes) -> bytes:
        """The numbers of a block, one byte each: 255 for a larger one."""
        if self.order < _BYTE_ORDER:
            return self._spread_out(raw)
        low = raw[self._width - 1 :: self._width]
        high = self._high(raw)
        return low if high is None else _either(low, high.translate(_ALL_BITS))

    def alone(self, raw: bytes) -> bytes:
        """One byte for each number of a block, not 0 only where the number is 1."""
        if self.order < _BYTE_ORDER:
            return self._spread_out(raw).translate(_ONLY_ONE)
        low = raw[self._width - 1 :: self._width].translate(_ONLY_ONE)
        high = self._high(raw)
        return low if high is None else _both(low, high.translate(_ALL_BITS).translate(_INVERTED))

    def used(self, raw: bytes) -> bytes:
        """One byte for each number of a block, 0 where the number is 0 and only there."""
        if self.order < _BYTE_ORDER:
            return self._spread_out(raw)
        low = raw[self._width - 1 :: self._width]
        high = self._high(raw)
        return low if high is None else _either(low, high)

    def _spread_out(self, raw: bytes) -> bytes:
        spread = _spread(self.order)
        return b"".join([spread[byte] for byte in raw])

    def _high(self, raw: bytes) -> bytes | None:
        """All but the lowest bytes of the numbers, combined by OR; None if all of them are 0."""
        parts = [raw[part :: self._width] for part in range(self._width - 1)]
        parts = [part for part in parts if part.count(0) != len(part)]
        return reduce(_either, parts) if parts else None

    def _place(self, index: int) -> tuple[int, int]:
        per_byte_bits = 3 - self.order
        return index >> per_byte_bits, (index & ((1 << per_byte_bits) - 1)) << self.order


def _either(left: bytes, right: bytes) -> bytes:
    return (int.from_bytes(left, "big") | int.from_bytes(right, "big")).to_bytes(len(left), "big")


def _both(left: bytes, right: bytes) -> bytes:
    return (int.from_bytes(left, "big") & int.from_bytes(right, "big")).to_bytes(len(left), "big")
