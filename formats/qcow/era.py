"""Name the layout of an image: the tool and the years that it is of (docs/specs/blktap-qcow.md, "Byte order of L1").

No field of an image says which program wrote it. A repair brings an old image into the last layout of blktap, and tapfs
writes that layout, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.formats.qcow.extended import table_cksum

if TYPE_CHECKING:
    from tapfs.formats.qcow.reader import QcowReader


def name(image: QcowReader) -> str | None:
    """The tool and the years whose layout an image has; None for the plain layout, which everybody writes."""
    extended = image.extended
    if extended is None:
        return None
    if extended.flags is None:
        return "blktap, 2006-07 to 2006-12 (12-byte extended header)"
    if has_oversized_l1(image):
        return "blktap of Xen 4.0 to 4.4 (L1 table with one entry per virtual byte)"
    if image.l1.is_empty:
        return "blktap, 2010-05 to 2014" if extended.big_endian_flag else "blktap, before 2010-05 (L1 still empty)"
    if image.l1.order == "big":
        return "blktap, 2010-05 to 2014" if extended.big_endian_flag else "blktap, 2008-03 to 2010-05"
    if extended.big_endian_flag:
        return "blktap, 2006-12 (little-endian L1; flag 0x02 then meant sparse)"
    if not image.cksum_valid and extended.cksum == table_cksum(image.l1.swapped()):
        return "blktap, 2008-03 to 2010-05 (L1 toggled to little-endian by an open)"
    return "blktap, 2006-07 to 2008-03 (little-endian L1)"


def has_oversized_l1(image: QcowReader) -> bool:
    """Whether the L1 table was sized one entry per virtual byte, as Xen 4.0 to 4.4 did.

    The header does not say so. The signs: the file reaches over such a table, nothing that L1 names
    lies inside it, and the cksum does not fit the normal length (the original took it over the
    oversized one, far too much to read here).
    """
    extended, header = image.extended, image.header
    if extended is None or not extended.big_endian_flag or image.cksum_valid:
        return False
    end = header.l1_table_offset + 8 * header.size
    if image.file.size() < end:
        return False
    return all(entry >= end for _, entry in image.l1.used())
