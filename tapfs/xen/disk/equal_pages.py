"""Offer the memory of this process, and of those that are forked from it, to the kernel for merging equal pages (KSM).

The processes of disks run the same code on the same objects. Python counts references within the objects, so each
process soon has its own copy of most pages. When the disks are idle, nine of ten of these copies are equal. The kernel
merges equal pages where an operator has it do so (docs/xen.md, "What a disk costs"). Buffers with data of guests are
mapped later than this, so they are never offered.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

#: madvise(2).
_MADV_MERGEABLE = 12


def offer_pages() -> None:
    """Offer all private memory that there is now, if this kernel merges pages at all."""
    madvise = ctypes.CDLL(None).madvise
    for line in Path("/proc/self/maps").read_text(encoding="ascii", errors="replace").splitlines():
        addresses, permissions, *rest = line.split()
        if permissions != "rw-p" or rest[-1] == "[stack]":
            continue
        start, _, end = addresses.partition("-")
        length = int(end, 16) - int(start, 16)
        # What it refuses is served from pages of its own, as ever.
        madvise(ctypes.c_void_p(int(start, 16)), ctypes.c_size_t(length), _MADV_MERGEABLE)
