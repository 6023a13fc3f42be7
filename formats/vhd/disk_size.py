"""The size of a VHD's disk: the footer has two, and who made the image decides (docs/specs/vhd.md, "Which size").

Microsoft's tools take the current size. Old Virtual PC and old QEMU made a disk of cylinders times heads times sectors.
"""

from __future__ import annotations

from tapfs.formats.vhd.footer import Footer
from tapfs.records import NamedTuple

_SECTOR = 512

#: Creators whose disks have the size of the geometry.
GEOMETRY_CREATORS = frozenset({b"vpc ", b"qemu"})

#: The largest disk that may be written, in bytes.
MAX_SIZE = 2040 << 30


class Cylinders(NamedTuple):
    """A geometry: cylinders, heads, sectors of a track."""

    cylinders: int
    heads: int
    sectors_per_track: int

    @property
    def sectors(self) -> int:
        """Sectors of the disk."""
        return self.cylinders * self.heads * self.sectors_per_track


#: The largest geometry that the fields hold. It says nothing about the size of the disk.
LARGEST = Cylinders(65535, 16, 255)


def disk_size(footer: Footer) -> int:
    """Bytes of the disk, as QEMU 10 decides: versions before it cut the tail off more images."""
    by_geometry = footer.creator in GEOMETRY_CREATORS
    if by_geometry and 0 < footer.geometry_size < LARGEST.sectors * _SECTOR:
        return footer.geometry_size
    return footer.current_size


def geometry_of(sectors: int) -> Cylinders:
    """The geometry that the appendix of Microsoft's document computes for a disk; it may be smaller than the disk."""
    sectors = min(sectors, LARGEST.sectors)
    if sectors >= 65535 * 16 * 63:
        return Cylinders(sectors // (16 * 255), 16, 255)
    tracks = sectors // 17
    heads = max(4, (tracks + 1023) // 1024)
    if tracks < heads * 1024 and heads <= 16:
        return Cylinders(tracks // heads, heads, 17)
    tracks = sectors // 31
    if tracks < 16 * 1024:
        return Cylinders(tracks // 16, 16, 31)
    return Cylinders(sectors // 63 // 16, 16, 63)


def geometry_not_below(sectors: int) -> Cylinders:
    """The least geometry of the appendix that holds a disk of so many sectors, or the largest of all."""
    wanted = sectors
    while (found := geometry_of(wanted)).sectors < min(sectors, LARGEST.sectors):
        wanted += 1
    return found
