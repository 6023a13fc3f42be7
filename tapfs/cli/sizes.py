"""Sizes as people write and read them. K, M, G, T, P and E are powers of 1024, as in qemu-img."""

from __future__ import annotations

_UNITS = "BKMGTPE"
#: The largest size that any image format here can name: offsets are signed 64-bit on the host.
MAXIMUM = (1 << 63) - 1


def parse_size(text: str) -> int:
    """Bytes from "700", "64K", "1.5G". Raises ValueError with a message for the operator."""
    number, unit = text.strip(), "B"
    if number and number[-1].upper() in _UNITS:
        number, unit = number[:-1], number[-1].upper()
    whole, _, fraction = number.partition(".")
    digits = whole + fraction
    if not (digits.isascii() and digits.isdigit() and whole):
        raise ValueError(f"not a size: {text!r} (a number of bytes, or with a suffix K, M, G, T, P or E)")
    if len(digits) > 40:
        raise ValueError(f"size too large: {text[:20]}...")
    scale: int = 10 ** len(fraction)
    size = (int(digits) << (10 * _UNITS.index(unit))) // scale
    if size > MAXIMUM:
        raise ValueError(f"size too large: {text} (at most {MAXIMUM} bytes)")
    return size


def human_size(size: int) -> str:
    """As in "1.5 GiB" and "700 B": at most three significant digits, no trailing zeros."""
    if size < 1024:
        return f"{size} B"
    exponent = min((size.bit_length() - 1) // 10, len(_UNITS) - 1)
    value = size / (1 << (10 * exponent))
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    text = f"{value:.{digits}f}"
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return f"{text} {_UNITS[exponent]}iB"
