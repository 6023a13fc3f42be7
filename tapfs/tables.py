"""Tables as data: how a format lays out the entries of its tables, so that the engine reads and decodes them itself.

A driver whose tables are plain describes them (:class:`Tabled`). Then a map miss costs one read of the host file and no
Python; a bitmap beside the table costs one more. `Driver.map` stays the reference: for any bytes both give the same
extents, or the engine leaves the unit to `map`, which raises the error that names the field. What is not plain is left
to `map` altogether.
"""

from __future__ import annotations

from array import array
from enum import IntEnum
from typing import Protocol, runtime_checkable

from tapfs.driver import Driver
from tapfs.extent import Kind
from tapfs.records import NamedTuple, dataclass

#: The place of a table that does not exist: all of its unit is of `TableLayout.absent_kind`.
ABSENT = 0
#: The place of a table that the engine must not read: `map` knows more than the disk, or knows better.
ASK = (1 << 64) - 1


class Rule(NamedTuple):
    """An entry whose bits under `mask` are `value` is of this kind. None: its unit is left to `map`."""

    mask: int
    value: int
    kind: Kind | None


class Where(IntEnum):
    """Where the bitmap of an entry is. The engine's C enum has the same values."""

    IN_ENTRY = 1
    IN_BLOCK = 2
    IN_TABLE = 3


@dataclass(frozen=True, slots=True)
class Bitmap:
    """Which granules of a DATA entry are DATA: one bit for each granule; a clear one is of `clear_kind`.

    An entry has a bitmap if ``entry & entry_mask == entry_value``, by default each one. DATA without one is DATA as a
    whole. Bit 0 is the least significant one of its byte, or the most significant one. The bits of a map unit are at
    most 64 KiB, and those of an entry are whole bytes.

    IN_ENTRY: `entry_granules` is 32. A word of 8 bytes follows each entry, in the same byte order. Its low 32 bits are
    the bitmap, from the least significant bit on. Bit ``32 + i`` makes granule i ZERO, and is impossible where bit i is
    set, too. The place is looked at only where a bit of the bitmap is set, `zero_mask` always. The word of a COMPRESSED
    entry is 0 (docs/specs/qcow2.md, "Refcounts, L1, L2").

    IN_BLOCK: the bitmap begins `block_bytes` before the data, so `TableLayout.place_add` counts them. Each entry costs
    a read: choose a map unit of one entry (docs/specs/vhd.md, "The sector bitmap").

    IN_TABLE: the bits of each `word_units` map units lie together, in the order of the disk. The n-th word of the
    table's width and byte order is at ``word_place + n * word_stride``. It says where the bits are, as an entry says it
    of data, and ``word & word_mask`` must be `word_value`. Only a unit with a bitmap costs the two reads more
    (docs/specs/vhdx.md, "BAT").
    """

    where: Where
    most_significant_first: bool = False
    clear_kind: Kind = Kind.UNALLOCATED
    entry_mask: int = 0
    entry_value: int = 0
    block_bytes: int = 0
    word_place: int = 0
    word_stride: int = 0
    word_units: int = 0
    word_mask: int = 0
    word_value: int = 0


@dataclass(frozen=True, slots=True)
class TableLayout:
    """The entries of a table: one for each `entry_granules` granules of its map unit, a word of 4 or 8 `entry_bytes`.

    The first of at most eight rules that fits gives the kind; an entry that none fits is DATA. The engine takes the
    host to be `host_size` bytes long. It takes no place before `least_place` or in one of the at most eight `reserved`
    ranges, neither for data, payloads and bitmaps nor for tables. With `tables_reserved` tables may lie there, such as
    one that has a fixed place. Where `data_file` is not `table_file`, DATA is bounded by `data_size` alone.

    DATA lies at ``number * place_multiplier + place_add``, a multiple of `place_alignment`, where number is
    ``((entry & place_mask) << place_shift) + ((entry & place_low_mask) >> place_low_shift)``. The largest of these must
    be below 2**63. DATA may be cut short by the end of the host; with `data_whole` it reaches as far as the disk does.
    In a writable image DATA is writable in place if ``entry & in_place_mask == in_place_value``. With `flagged_places`
    bit 0 of a table's place says that nothing in the table is; its unit is left to `map` if an entry says otherwise.
    DATA is impossible if
    a bit of `zero_mask` is set, and with `place_is_offset` where it lies elsewhere in its file than on the disk.
    With `zeros_keep_places` entries of zeros, and of nothing, may have a place as DATA has
    (`tapfs.driver.ZeroPlacing`).

    A COMPRESSED payload lies at ``(entry & packed_place_mask) << packed_place_shift`` of `data_file`. Its length in
    bytes is the field `packed_length_mask` at `packed_length_shift`. With `packed_sector_bytes` that field counts
    sectors after the first. With `packed_bound` there is no such field: the payload has that many bytes, or ends with
    the host.
    """

    entry_bytes: int
    big_endian: bool
    host_size: int
    rules: tuple[Rule, ...]
    place_mask: int
    place_shift: int = 0
    place_low_mask: int = 0
    place_low_shift: int = 0
    place_multiplier: int = 1
    place_add: int = 0
    place_alignment: int = 1
    data_whole: bool = False
    in_place_mask: int = 0
    in_place_value: int = 0
    zero_mask: int = 0
    packed_place_mask: int = 0
    packed_place_shift: int = 0
    packed_length_shift: int = 0
    packed_length_mask: int = 0
    packed_sector_bytes: int = 0
    packed_bound: int = 0
    entry_granules: int = 1
    bitmap: Bitmap | None = None
    absent_kind: Kind = Kind.UNALLOCATED
    table_alignment: int = 1
    tables_reserved: bool = False
    flagged_places: bool = False
    place_is_offset: bool = False
    zeros_keep_places: bool = False
    least_place: int = 0
    reserved: tuple[tuple[int, int], ...] = ()
    table_file: int = 0
    data_file: int = 0
    data_size: int = 0


@runtime_checkable
class Tabled(Driver, Protocol):
    """A driver whose tables the engine can read."""

    def table_layout(self) -> TableLayout | None:
        """The layout, for as long as the image is open; None if the tables of this image are not plain."""
        ...

    def table_places(self, first: int, count: int) -> array[int]:
        """The host offset of the table of each map unit from `first` on, as unsigned 64-bit numbers, ABSENT or ASK.

        ASK for every unit of which the table (with its bitmap) on the host does not say what `map` says. After a commit
        the core asks again only when `flushed` has been called. A fixed table of a whole disk is pieces: the place of a
        unit is that of its first entry.
        """
        ...

    @property
    def host_size(self) -> int:
        """The length of the table and data files now, as `TableLayout.host_size`; it grows with the allocation."""
        ...


class GuardedPlaces(NamedTuple):
    """Places of the image's file, of `size` bytes each, and ranges ``[start, stop)``; both ascend, ranges are apart."""

    size: int
    places: array[int]
    ranges: tuple[tuple[int, int], ...] = ()


@runtime_checkable
class Guarded(Tabled, Protocol):
    """A writable driver whose metadata lies among the data, where a damaged table may lead a write.

    The engine looks for each write in place whether it goes over one of the places. Such a write is left to `reserve`,
    which refuses it. The core gives the engine a new list before it executes a plan, and after `flushed`.
    """

    @property
    def guard_changes(self) -> int:
        """A number that is another one whenever the places have changed."""
        ...

    def guarded_places(self) -> GuardedPlaces:
        """Where metadata is, and where the plan that `flush` returned last will write some."""
        ...
