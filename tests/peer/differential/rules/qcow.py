"""Known disagreements about qcow."""

from __future__ import annotations

import zlib

from tests.peer.differential.rules.rule import Right, Rule, of_the_file
from tests.peer.differential.run import SECTOR, Difference, Sort
from tests.peer.qcow2_damage.sound import IMAGE

_QCOW = ("qcow",)
_READ, _REFUSED = (Sort.TAPFS_CANNOT_READ,), (Sort.TAPFS_REFUSES,)


def _is_fast_path(difference: Difference) -> bool:
    """Whether blktap has laid the image out in one piece, which its header says."""
    return difference.seed.kind.startswith("blktap")


def _is_unpacked_right(difference: Difference) -> bool:
    """Whether tapfs shows what zlib makes of the compressed cluster."""
    data = difference.files[IMAGE]
    bits, l2_bits, l1_at = data[32], data[33], int.from_bytes(data[40:48], "big")
    index, inside = divmod(difference.place, 1 << bits + l2_bits)
    table = int.from_bytes(data[l1_at + 8 * index :][:8], "big")
    word = int.from_bytes(data[table + 8 * (inside >> bits) :][:8], "big")
    start, length = word & ((1 << 63 - bits) - 1), word >> 63 - bits & ((1 << bits) - 1)
    if not word >> 63:
        return False
    try:
        unpacked = zlib.decompressobj(-15).decompress(data[start : start + length], 1 << bits)
    except zlib.error:
        return False
    at = inside % (1 << bits)
    return unpacked[at : at + SECTOR] == difference.ours


RULES = (
    Rule(
        _QCOW,
        (Sort.BYTES, Sort.QEMU_CANNOT_READ),
        "",
        "A damaged entry of an image that blktap has laid out in one piece",
        "reads by the fast path",
        "reads by the entry",
        Right.TAPFS,
        "the checksum of L1 says that the fast path is alive, and blktap reads so",
        _is_fast_path,
    ),
    Rule(
        _QCOW,
        (Sort.BYTES,),
        "",
        "A compressed cluster that was read before another one that cannot be unpacked",
        "its bytes",
        "read again: its bytes with parts of the other one's, exit 0",
        Right.TAPFS,
        "QEMU goes on to take its buffer for the first cluster's after the second has failed in it",
        _is_unpacked_right,
    ),
    Rule(
        _QCOW,
        _REFUSED,
        "in either byte order|L1 table .* past the end|inside the header|past the end of the file|out_of_bounds",
        "A first table, or a name, that is not where the header says, or entries of it that lead nowhere",
        "refuses",
        "shows zeros, or the bytes that stand there",
        Right.TAPFS,
        "the byte order of an L1 is known by its entries only",
    ),
    Rule(
        _QCOW,
        _READ,
        "past the end of the file|inside the (header|L1 table)|not aligned|compressed cluster",
        "Entries that lead past the end of the file or into tables",
        "says so",
        "shows zeros, or the tables",
        Right.TAPFS,
        "that is not what the guest wrote",
        of_the_file,
    ),
    Rule(
        _QCOW,
        (Sort.QEMU_REFUSES,),
        "Could not open|[Bb]acking|No encryption|Image size too|cluster size|L2",
        "A name of a parent of no bytes at a wild place, header fields that mean nothing then",
        "reads the image",
        "refuses",
        Right.EITHER,
        "there is no parent, so there is nothing to look for",
    ),
)
