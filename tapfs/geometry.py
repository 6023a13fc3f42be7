"""The constants of an open image: its size, its units, its parent, its codec and its cipher."""

from __future__ import annotations

from enum import IntEnum

from tapfs.ciphers import Cipher
from tapfs.records import NamedTuple, dataclass


class Codec(IntEnum):
    """How the bytes of a COMPRESSED extent are packed. The engine's C enum has the same values."""

    NONE = 0
    RAW_DEFLATE = 1
    ZLIB = 2
    ZSTD = 3
    #: These only unpack. LZMA is a stream of the .xz format, ADC is Apple's.
    BZIP2 = 4
    LZMA = 5
    LZFSE = 6
    ADC = 7


@dataclass(frozen=True, slots=True)
class Packing:
    """How payloads are packed: each unpacks to `unit` bytes, a multiple of the granule (0: one granule).

    With a header of `header_bytes` the packed bytes follow it, as many as its little-endian field of `length_bytes`
    (4 or 8) at `length_at` says. The length in the extent is only a bound then. A payload may have slack behind it and
    may cross clusters of the host file. The last payload may unpack to less, if the disk ends in its unit.

    `own_units`: payloads unpack to lengths of their own, at most `unit` bytes and at most 64 MiB, and begin anywhere;
    `Extent.skip` says where in its unit an extent begins. Such an image is only read.
    """

    codec: Codec
    unit: int = 0
    header_bytes: int = 0
    length_at: int = 0
    length_bytes: int = 0
    own_units: bool = False


class Identity(NamedTuple):
    """One extent is the whole disk: byte i of the disk is byte ``host_offset + i`` of host file `file`."""

    file: int = 0
    host_offset: int = 0


class ParentSearch(NamedTuple):
    """How the parent of an image is found that names no file: by an identity, among the files of some folders.

    `identity` is one of those that the driver of the parent has (`Identified`). `folders` are relative to that of the
    image; the user may name more.
    """

    identity: str
    folders: tuple[str, ...] = ("",)


class BackingReference(NamedTuple):
    """The parent that an image names. `format` is None where the header is silent.

    `others` are further names of the same parent, which are tried in order where there is no file `name`.
    `identity` is what the parent must be, as its driver says it (`Identified`); None where the image does not say. The
    parent may be one of `other_identities` instead.
    With a `search` the image names no file, and `name` is empty.
    """

    name: str
    format: str | None = None
    others: tuple[str, ...] = ()
    identity: str | None = None
    search: ParentSearch | None = None
    other_identities: tuple[str, ...] = ()

    @property
    def said(self) -> str:
        """The parent as the image says it, for people."""
        return self.name if self.search is None else self.search.identity


#: The largest disk, in bytes: no map unit that begins in it ends past the largest offset of a host file.
MAX_DISK_BYTES = (1 << 63) - 1 - (1 << 30)


@dataclass(frozen=True, slots=True)
class Geometry:
    """The constants of an open image, all lengths in bytes.

    `virtual_size`: at most `MAX_DISK_BYTES`; an image of a larger disk is refused when it is opened.
    `granule`: the smallest piece mapped on its own; reservations are aligned to it (the last
    one may reach past `virtual_size`). `map_unit`: a multiple of `granule` whose map `map`
    answers whole, and which the engine caches whole (one L2 table, one grain table); at most
    1 GiB. `identity`: the whole disk is one extent, writable in place for a writable image; the
    engine then asks for no map at all. `packing` and `cipher` say what COMPRESSED and DATA extents hold.
    `sector_size`: the guest's sectors, in which its partition tables count; None where the image does not say.

    A geometry holds for one opening of the image. Who resizes or reverts an image opens it anew; the layers that the
    core makes of it are the next generation, and the old ones are closed (`tapfs.disk.live`).
    """

    virtual_size: int
    granule: int
    map_unit: int
    identity: Identity | None = None
    backing: BackingReference | None = None
    packing: Packing | None = None
    cipher: Cipher | None = None
    sector_size: int | None = None

    @property
    def packed_unit(self) -> int:
        """The bytes that one payload unpacks to."""
        return self.packing.unit or self.granule if self.packing is not None else self.granule
