"""Open and map a VMDK: the geometry of the disk, its parent, and the map over all of its parts."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence

from tapfs.driver import (
    BackingReference,
    Codec,
    Geometry,
    HostFile,
    Identity,
    OpenRequest,
    Packing,
)
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Extent, clip, merge
from tapfs.formats.rounding import round_up
from tapfs.formats.vmdk.content_id import content_identity, named_by
from tapfs.formats.vmdk.descriptor import Descriptor
from tapfs.formats.vmdk.extent_names import parent_names
from tapfs.formats.vmdk.grain_tables import GrainTables
from tapfs.formats.vmdk.markers import GRAIN_LENGTH_AT, GRAIN_LENGTH_BYTES
from tapfs.formats.vmdk.opening import open_disk
from tapfs.formats.vmdk.parts import ClosedPart, FlatPart, Part, SparsePart
from tapfs.formats.vmdk.sectors import SECTOR
from tapfs.formats.vmdk.sesparse_tables import SeSparseTables
from tapfs.formats.vmdk.uuid_link import identities, uuid_link
from tapfs.tables import ABSENT, TableLayout

_MAX_MAP_UNIT = 1 << 30


class VmdkReader:
    """An open disk, read-only: a :class:`tapfs.driver.Driver` but for its details."""

    format_name = "vmdk"

    def __init__(self, file: HostFile, request: OpenRequest) -> None:
        self.file = file
        self.writable = request.writable
        #: Makes space for a check to work in.
        self.scratch = request.scratch
        self.disk = open_disk(file, request)
        self.descriptor: Descriptor | None = self.disk.descriptor
        self.parts: list[Part] = self.disk.parts
        self._geometry = self._decide_geometry()

    @property
    def geometry(self) -> Geometry:
        """The constants of the disk."""
        return self._geometry

    @property
    def identities(self) -> frozenset[str]:
        """The content ID, which the disks over this one have written down, and the UUIDs that VirtualBox's have."""
        cid = None if self.descriptor is None else self.descriptor.cid
        return named_by(cid) | identities(self.descriptor)

    def map(self, offset: int, length: int) -> list[Extent]:
        """The map of the whole granules that the range touches; see :meth:`tapfs.driver.Driver.map`."""
        granule = self._geometry.granule
        start = offset // granule * granule
        return list(merge(self._extents(start, round_up(offset + length, granule))))

    def empty_run(self, offset: int, end: int) -> Extent | None:
        """The tables from `offset` on that are not there, or the hole of a flat file, inside one part."""
        for part in self._parts_between(offset, offset + 1):
            return part.empty_run(offset, min(end, part.offset + part.length))
        return None

    def table_layout(self) -> TableLayout | None:
        """The grain tables, if one extent is the whole disk."""
        tables = self._tables_of_all()
        if tables is None:
            return None
        return tables.table_layout(self.disk.sparse[0].number, self.disk.sparse[0].header_bytes)

    def table_places(self, first: int, count: int) -> array[int]:
        """The directory; a table that is only in the redundant one is left to `map`."""
        tables = self._tables_of_all()
        return array("Q", [ABSENT]) * count if tables is None else tables.places(first, count)

    @property
    def host_size(self) -> int:
        """The length of the file of the extent, with what has been allocated."""
        tables = self._tables_of_all()
        return self.file.size() if tables is None else tables.file_size

    # -- geometry -------------------------------------------------------------------------------

    def _decide_geometry(self) -> Geometry:
        size = self.disk.size
        sparse = [part for part in self.parts if isinstance(part, SparsePart)]
        backing = self._backing(has_entries=bool(sparse))
        packing = self._packing(sparse)
        if not sparse:
            if backing is not None:
                message = "is a delta over a parent, and has no sparse extent that could show it"
                raise ImageError(ErrorKind.CORRUPT, message, path=self.file.path, op="open")
            return Geometry(size, SECTOR, self._unit(_MAX_MAP_UNIT), identity=self._identity())
        # A granule lies in one part, and no grain begins inside one.
        borders = [part.offset for part in self.parts]
        granule = math.gcd(*(part.tables.grain for part in sparse), *borders)
        granule &= -granule
        if packing is not None and granule != max(part.tables.grain for part in sparse):
            message = "has packed extents beside others that do not begin on whole grains"
            raise ImageError(ErrorKind.UNSUPPORTED, message, path=self.file.path, op="open")
        unit = max(granule, self._unit(min(_MAX_MAP_UNIT, *(part.span for part in sparse))))
        return Geometry(size, granule, unit, backing=backing, packing=packing)

    def _unit(self, most: int) -> int:
        """The map unit, at most `most`. No unit has both what may be read and what may not."""
        if not any(isinstance(part, ClosedPart) for part in self.parts):
            return most
        borders = math.gcd(most, *(part.offset for part in self.parts))
        return borders & -borders

    def _identity(self) -> Identity | None:
        if len(self.parts) != 1:
            return None
        part = self.parts[0]
        if not isinstance(part, FlatPart) or part.writable != self.writable:
            return None
        return Identity(part.number, part.host_offset)

    def _packing(self, sparse: Sequence[SparsePart]) -> Packing | None:
        packed = {part.header_bytes for part in sparse if part.header_bytes}
        if not packed:
            return None
        if len(packed) > 1:
            message = "has packed extents with and without markers"
            raise ImageError(ErrorKind.UNSUPPORTED, message, path=self.file.path, op="open")
        header_bytes = packed.pop()
        at = 0 if header_bytes == GRAIN_LENGTH_BYTES else GRAIN_LENGTH_AT
        return Packing(Codec.ZLIB, header_bytes=header_bytes, length_at=at, length_bytes=GRAIN_LENGTH_BYTES)

    def _backing(self, *, has_entries: bool) -> BackingReference | None:
        descriptor = self.descriptor
        if descriptor is None:
            return None
        hint = descriptor.values.get("parentfilenamehint")
        names = () if hint is None else parent_names(descriptor.parent_name, hint.content)
        if descriptor.parent_cid is None:
            # A descriptor that says ffffffff has no parent by a name; one that says nothing may have one.
            if names and "parentcid" not in descriptor.values:
                return self._reference(names, None)
            link = uuid_link(descriptor, self.file.path) if has_entries else None
            return None if link is None else link.reference
        if not names:
            raise ImageError(
                ErrorKind.CORRUPT,
                f"is a delta over the disk with the CID {descriptor.parent_cid:08x}, and does not name it",
                path=self.file.path,
                offset=descriptor.base + descriptor.values["parentcid"].at,
                op="open",
                remedy='add a line parentFileNameHint="FILE" to the descriptor',
            )
        second = descriptor.second_parent_cid
        others = () if second is None or second.cid is None else (content_identity(second.cid),)
        return self._reference(names, content_identity(descriptor.parent_cid), others)

    def _reference(self, names: Sequence[str], identity: str | None, others: tuple[str, ...] = ()) -> BackingReference:
        return BackingReference(names[0], self.format_name, tuple(names[1:]), identity, other_identities=others)

    # -- the map --------------------------------------------------------------------------------

    def _extents(self, start: int, end: int) -> Iterator[Extent]:
        granule = self._geometry.granule
        for part in self._parts_between(start, end):
            stop = part.offset + part.length
            # Only the last granule of the disk may reach behind its part.
            limit = round_up(stop, granule) if stop == self.disk.size else stop
            first = max(start, part.offset)
            yield from clip(part.extents(first, min(end, limit)), first, min(end, limit) - first)

    def _parts_between(self, start: int, end: int) -> Iterator[Part]:
        low, high = 0, len(self.parts)
        while low < high:
            middle = (low + high) // 2
            if self.parts[middle].offset + self.parts[middle].length <= start:
                low = middle + 1
            else:
                high = middle
        while low < len(self.parts) and self.parts[low].offset < end:
            yield self.parts[low]
            low += 1

    def _tables_of_all(self) -> GrainTables | SeSparseTables | None:
        """The tables that the engine may read by itself."""
        if len(self.parts) != 1 or len(self.disk.sparse) != 1:
            return None
        tables = self.disk.sparse[0].tables
        part = self.parts[0]
        whole = part.length > 0 and self._geometry.map_unit == tables.grain * tables.table_entries
        return tables if whole else None
