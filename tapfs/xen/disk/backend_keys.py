"""The keys that tell a frontend what its disk is (xen/include/public/io/blkif.h, "Backend Device Properties")."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.disk.live import SECTOR

if TYPE_CHECKING:
    from tapfs.xen.disk.served_disk import ServedDisk
    from tapfs.xen.disk.settings import DiskSettings

#: `info` of a connected disk.
_CDROM, _REMOVABLE, _READ_ONLY = 1, 2, 4

#: The alignment in bytes that suits file systems on the disk.
_PHYSICAL_SECTOR = 4096


def disk_keys(disk: ServedDisk, settings: DiskSettings) -> dict[str, str | int | None]:
    """What the disk is now. An error that stood there is over.

    `sectors` and the requests count in 512 bytes, whatever `sector-size` is, which says how requests are aligned.
    """
    image = disk.image
    sector = image.sector_size if image.size % image.sector_size == 0 else SECTOR
    physical = max(sector, _PHYSICAL_SECTOR if image.size % _PHYSICAL_SECTOR == 0 else SECTOR)
    info = (
        (_CDROM if settings.cdrom else 0)
        | (_REMOVABLE if settings.removable else 0)
        | (0 if image.writable else _READ_ONLY)
    )
    return {
        "sectors": image.size // SECTOR,
        "sector-size": sector,
        "physical-sector-size": physical,
        "info": info,
        "feature-discard": int(disk.takes_discards),
        "discard-granularity": max(image.granule, physical),
        "discard-alignment": 0,
        "tapfs/error": None,
        "tapfs/error-kind": None,
    }
