"""Sizes as people write and read them: bytes, or a number with a unit.

K, M, G, T, P and E are powers of 1024, as in qemu-img, and so are KiB, MiB and so on. KB, MB and so
on are powers of 1000, as in coreutils.
"""

from __future__ import annotations

import re

from tapfs.patterns import pattern

_UNITS = "BKMGTPE"
_SIZE = pattern(r"([0-9]+)(?:\.([0-9]*))?(?:([KMGTPE])(iB|B)?|B)?", re.IGNORECASE | re.ASCII)
#: The largest size that any image format here can name: offsets are signed 64-bit on the host.
MAXIMUM = (1 << 63) - 1
#: Python refuses to read a number of some thousands.
_MOST_DIGITS = 40
#: The notation of sizes, for errors.
_NOTATION = "a number of bytes, or with a unit: K, M, G, T, P, E (or KiB, ...) of 1024, KB, MB, ... of 1000"


def parse_size(text: str) -> int:
    """Bytes from "700", "64K", "1.5G", "1GiB", "10MB". Raises ValueError with a message for the operator.

    A fraction of a unit is cut off to whole bytes; a fraction of a byte ("10.5") is no size.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"not a size: {_shortened(text)!r} ({_NOTATION})")
    whole, fraction, letter, suffix = found.groups()
    if letter is None and fraction is not None:
        raise ValueError(f"not a size: {_shortened(text)!r} is a fraction of a byte; is a unit missing ({text}M)?")
    digits = whole + (fraction or "")
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"size too large: {_shortened(text)}")
    power = _UNITS.index((letter or "B").upper())
    unit: int = 1000**power if suffix is not None and suffix.upper() == "B" else 1024**power
    scale: int = 10 ** len(fraction or "")
    size = int(digits) * unit // scale
    if size > MAXIMUM:
        raise ValueError(f"size too large: {text} (at most {MAXIMUM} bytes)")
    return size


def whole_number(text: str) -> int:
    """A number without a unit, from zero on. Raises ValueError with a message for the operator."""
    if not (text.isascii() and text.isdigit()) or len(text) > _MOST_DIGITS:
        raise ValueError(f"not a number: {_shortened(text)!r}")
    return int(text)


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


def sizes_in_options(options: dict[str, str]) -> dict[str, str]:
    """The `-o` values of a format with sizes such as `64K` as plain numbers, which is what drivers take."""
    return {name: str(parse_size(value)) if _has_unit(value) else value for name, value in options.items()}


def _has_unit(text: str) -> bool:
    found = _SIZE.fullmatch(text)
    return found is not None and found[3] is not None


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else text[:20] + "..."
