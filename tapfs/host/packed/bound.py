"""The bound of what is unpacked in one pass: a small packed file may hold more than any disk.

Such a file keeps who opens it busy for hours, and zeros in it take no space that would end that. Disks are mostly
empty, so their packed files may hold hundreds of times their length: up to a size that many disks have any file may.
"""

from __future__ import annotations

import os
import re

from tapfs.errors import ErrorKind, ImageError

#: The user's own bound, in bytes with a suffix, or "none".
VARIABLE = "TAPFS_UNPACK_LIMIT"

#: Any file may hold so many bytes, and a large one so many times its length.
LEAST_BYTES, TIMES = 64 << 30, 64

_SUFFIXES = " KMGTPE"


def most_bytes(packed_bytes: int) -> int | None:
    """The bytes that a packed file of a length may hold, None without a bound. Raises ImageError(invalid_argument)."""
    said = os.environ.get(VARIABLE, "").strip()
    if not said:
        return max(LEAST_BYTES, TIMES * packed_bytes)
    if said.lower() == "none":
        return None
    found = re.fullmatch(r"([0-9]{1,19})([KMGTPE]?)", said.upper())
    if found is None:
        message = f"{VARIABLE} is {said!r}, which is no number of bytes such as 500G, and not none"
        raise ImageError(ErrorKind.INVALID_ARGUMENT, message, op="unpack")
    return int(found[1]) << 10 * max(0, _SUFFIXES.find(found[2] or " "))


def too_much(path: str, most: int) -> ImageError:
    """The error of a file that holds more than `most` bytes."""
    return ImageError(
        ErrorKind.UNSUPPORTED,
        f"holds more than {most} bytes, and can only be unpacked from its start on: a bomb is packed so",
        path=path,
        op="unpack",
        remedy=f"if you trust it set {VARIABLE}=none in the environment, or a number such as 4T; or unpack it first",
    )
