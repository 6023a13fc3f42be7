"""The L2 entries of a qcow2 image as data, for the engine to count what they refer to (`tapfs.references`)."""

from __future__ import annotations

from typing import Protocol

from tapfs.driver import HostFile
from tapfs.formats.qcow2.entries import COMPRESSED, COPIED, OFFSET, RESERVED, ZERO, packed_bits
from tapfs.formats.qcow2.header import MAX_HOST_SIZE, Header
from tapfs.formats.qcow2.signature import VERSIONS
from tapfs.references import EntryCounter, EntryLayout, entry_counter

#: The clusters of a window, as a power of two: 32 MiB of counters, or 64 MiB where some are large.
WINDOW_BITS = 25


class CountedImage(Protocol):
    """What the layout of the entries depends on."""

    file: HostFile
    header: Header

    def reserved(self) -> tuple[tuple[str, int, int], ...]:
        """The name, start and end of each table in which no data can lie."""
        ...


def counter_of(image: CountedImage) -> EntryCounter | None:
    """None without the engine, and where entries refer to clusters of another file, which have no counts."""
    return None if image.header.has_data_file else entry_counter(_layout(image))


def _layout(image: CountedImage) -> EntryLayout:
    header = image.header
    bits = packed_bits(header.cluster_bits)
    has_zeros = header.version > VERSIONS[0] and not header.extended_l2
    return EntryLayout(
        cluster_bits=header.cluster_bits,
        file_size=image.file.size(),
        place_mask=OFFSET,
        owned_mask=COPIED,
        packed_mask=COMPRESSED,
        packed_place_mask=(1 << bits) - 1,
        packed_length_shift=bits,
        packed_length_mask=(1 << header.cluster_bits - 8) - 1,
        zero_mask=ZERO if has_zeros else 0,
        impossible_mask=RESERVED | (0 if has_zeros else ZERO),
        packed_impossible_mask=COPIED,
        bitmaps=header.extended_l2,
        least_place=header.cluster_size,
        # A damaged header may say a table lies behind everything that can be addressed.
        reserved=tuple((min(start, MAX_HOST_SIZE), min(stop, MAX_HOST_SIZE)) for _, start, stop in image.reserved()),
    )
