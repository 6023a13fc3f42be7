"""CRC-32C (Castagnoli), the sum of some formats' metadata: in Python, or by the processor once the engine is loaded.

The engine gives its function by `use_crc32c`. Whoever sums need not know which one it is: both give the same number.

A structure of 64 KiB is mostly zeros at its end. So in Python only the bytes before those zeros are summed one by one;
the zeros are one multiplication of polynomials, whatever their number. Structures of one kind mostly have the same
number of them, so the factor is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

#: The polynomial, its bits reflected.
_POLYNOMIAL = 0x82F63B78
#: The polynomials 1 and x, reflected.
_ONE, _X = 1 << 31, 1 << 30
_ALL = 0xFFFFFFFF
#: So many zeros are left out at a time.
_PIECE = 1024
_ZEROS = bytes(_PIECE)


def _table() -> tuple[int, ...]:
    entries: list[int] = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
        entries.append(value)
    return tuple(entries)


_TABLE = _table()


def in_python(data: bytes) -> int:
    """The checksum of the bytes. It takes about 0.1 µs for each byte before the zeros at the end."""
    end = len(data)
    while data[end - _PIECE : end] == _ZEROS:  # `rstrip` alone goes byte by byte
        end -= _PIECE
    significant = data[:end].rstrip(b"\0")
    register, table = _ALL, _TABLE
    for byte in significant:
        register = table[(register ^ byte) & 0xFF] ^ register >> 8
    return _product(register, _power_of_zeros(len(data) - len(significant))) ^ _ALL


@lru_cache(maxsize=256)
def _power_of_zeros(count: int) -> int:
    """What `count` bytes of zeros multiply a register by: x to the power of 8 * count."""
    bits, square = 8 * count, _X
    factor = _ONE
    while bits:
        if bits & 1:
            factor = _product(factor, square)
        square = _product(square, square)
        bits >>= 1
    return factor


def _product(left: int, right: int) -> int:
    """The product of two reflected polynomials modulo that of the checksum."""
    product, bit = 0, _ONE
    while bit:
        if left & bit:
            product ^= right
        right = right >> 1 ^ (_POLYNOMIAL if right & 1 else 0)
        bit >>= 1
    return product


_sum: Callable[[bytes], int] = in_python


def crc32c(data: bytes) -> int:
    """The checksum of the bytes, a number of 32 bits."""
    return _sum(data)


def use_crc32c(function: Callable[[bytes], int]) -> None:
    """Sum by this function from now on."""
    global _sum  # noqa: PLW0603  one function of the process, which only becomes faster
    _sum = function
