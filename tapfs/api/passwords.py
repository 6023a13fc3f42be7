"""Passwords of encrypted images: `add_password` and `remove_password` of `import tapfs`."""

from __future__ import annotations

import os

from tapfs.disk.chain import OpenOptions
from tapfs.driver import SlotChange


def add_password(
    path: str | os.PathLike[str],
    new: bytes,
    *,
    password: bytes,
    format: str | None = None,  # noqa: A002 - the word of the field
    slot: int | None = None,
    milliseconds: int = 2000,
) -> None:
    """Have `new` open the LUKS image, too, which `password` opens: a bare LUKS1 container, or a qcow2 image.

    It goes into key slot `slot`, or a free one, and takes about so many milliseconds to be tried. Nobody else may use
    the image meanwhile. Durable when this returns; a crash leaves the passwords as before or as wanted.
    Raises ImageError.
    """
    _change(path, format, SlotChange(True, password, new, slot, milliseconds))


def remove_password(
    path: str | os.PathLike[str],
    old: bytes | None,
    *,
    password: bytes,
    format: str | None = None,  # noqa: A002 - as above
    slot: int | None = None,
) -> None:
    """Have `old` open the LUKS image no more, or what key slot `slot` holds if `old` is None.

    `password` is one that stays. The last one is never removed. Raises ImageError.
    """
    if (old is None) == (slot is None):
        raise ValueError("either a password or a key slot is removed")
    _change(path, format, SlotChange(False, password, old or b"", slot))


def _change(path: str | os.PathLike[str], format_name: str | None, change: SlotChange) -> None:
    from tapfs.jobs.amend import change_passwords

    change_passwords(os.fsdecode(path), OpenOptions(format=format_name), change)
