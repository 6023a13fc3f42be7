"""Tables as data: how a format lays out the entries of its tables, so that the engine reads and decodes them itself.

A driver whose tables are plain describes them (:class:`Tabled`). Then a map miss costs one read of the host file and no
Python. `Driver.map` stays the reference: for any bytes both give the same extents, or the engine leaves the unit to
`map`, which raises the error that names the field. What is not plain is left to `map` altogether.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from tapfs.driver import Driver
from tapfs.extent import Kind

#: The place of a table that does not exist: all of its unit is of `TableLayout.absent_kind`.
ABSENT = 0
#: The place of a table that the engine must not read: `map` knows more than the disk, or knows better.
ASK = (1 << 64) - 1


class Rule(NamedTuple):
    """An entry whose bits under `mask` are `value` is of this kind."""

    mask: int
    value: int
    kind: Kind


@dataclass(frozen=True, slots=True)
class TableLayout:
    """The entries of a table, one for each granule of its map unit, in words of `entry_bytes` (4 or 8).

    The first rule that fits gives the kind; an entry that none fits is DATA. The engine takes the host to be
    `host_size` bytes long, and takes no place before `least_place` or in one of the two `reserved` ranges.

    DATA lies at ``((entry & place_mask) << place_shift) + place_add``, a multiple of `place_alignment`. In a writable
    image DATA is writable in place if ``entry & in_place_mask == in_place_value``. DATA is impossible if a bit of
    `zero_mask` is set. A COMPRESSED payload lies at ``entry & packed_place_mask``. Its length in bytes is the field
    `packed_length_mask` at `packed_length_shift`. With `packed_sector_bytes` that field counts sectors after the first.
    """

    entry_bytes: int
    big_endian: bool
    host_size: int
    rules: tuple[Rule, ...]
    place_mask: int
    place_shift: int = 0
    place_add: int = 0
    place_alignment: int = 1
    in_place_mask: int = 0
    in_place_value: int = 0
    zero_mask: int = 0
    packed_place_mask: int = 0
    packed_length_shift: int = 0
    packed_length_mask: int = 0
    packed_sector_bytes: int = 0
    absent_kind: Kind = Kind.UNALLOCATED
    table_alignment: int = 1
    least_place: int = 0
    reserved: tuple[tuple[int, int], ...] = ()
    table_file: int = 0
    data_file: int = 0


@runtime_checkable
class Tabled(Driver, Protocol):
    """A driver whose tables the engine can read."""

    def table_layout(self) -> TableLayout | None:
        """The layout, for as long as the image is open; None if the tables of this image are not plain."""
        ...

    def table_places(self, first: int, count: int) -> array[int]:
        """The host offset of the table of each map unit from `first` on, as unsigned 64-bit numbers, ABSENT or ASK.

        ASK for every unit of which the table on the host does not say what `map` says. After a commit the core asks
        again only when `flushed` has been called.
        """
        ...

    @property
    def host_size(self) -> int:
        """The length of the table and data files now, as `TableLayout.host_size`; it grows with the allocation."""
        ...
