"""Mutated images of the formats with headers and tables of their own beside their sound ones: which parts were changed.

Each answer is by the bytes of the two images, not by what a reader says of them.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.peer.differential.run import Difference
from tests.peer.qcow2_damage.sound import IMAGE

_PAGE, _MIB = 4096, 1 << 20
#: Regions of a VHDX: its BAT, its metadata.
_REGIONS = (bytes.fromhex("6677c22d23f600429d64115e9bfd4a08"), bytes.fromhex("06a27c8b90479a4bb8fe575f050f886e"))
_REGION_TABLES = (192 << 10, 256 << 10)
#: Flags of a VMDK's header: grains are packed, and markers stand before tables and grains.
_PACKED_FLAGS = 3 << 16


def vhd_start_changed(difference: Difference) -> bool:
    """Whether the copy of a VHD's footer, or what it leads to, is not what the footer at the end stands for."""
    now, sound = _both(difference)
    return len(now) != len(sound) or now[:1536] != sound[:1536] or now[-512:] != sound[-512:]


def vhd_block_cut(difference: Difference) -> bool:
    """Whether the block of the sector ends behind the end of a VHD's file."""
    now, _ = _both(difference)
    header = now.find(b"cxsparse")
    if header < 0:
        return False
    table, size = int.from_bytes(now[header + 16 : header + 24], "big"), int.from_bytes(now[header + 32 :][:4], "big")
    if not size:
        return False
    entry = int.from_bytes(now[table + 4 * (difference.place // size) :][:4], "big")
    bitmap = -(-size // 4096 // 512) * 512
    return entry != 0xFFFFFFFF and entry * 512 + bitmap + size > len(now)


def vhdx_structure_changed(difference: Difference) -> bool:
    """Whether a VHDX has another length, another header or region table, or entries or items that were changed."""
    now, sound = _both(difference)
    if len(now) != len(sound) or now[:_MIB] != sound[:_MIB] or now[_MIB : 2 * _MIB] != sound[_MIB : 2 * _MIB]:
        return True
    return any(now[start:end] != sound[start:end] for start, end in _regions(sound))


def _regions(sound: bytes) -> Iterator[tuple[int, int]]:
    for table in _REGION_TABLES:
        for region in _REGIONS:
            at = sound.find(region, table, table + (64 << 10))
            if at >= 0:
                start, length = (
                    int.from_bytes(sound[at + 16 : at + 24], "little"),
                    int.from_bytes(sound[at + 24 :][:4], "little"),
                )
                yield start, start + length


def vhdx_entry_of_another_length(difference: Difference) -> bool:
    """Whether an entry of a VHDX's log has more sectors than its descriptors and their pages take."""
    ring, at = _both(difference)[0][_MIB : 2 * _MIB], -1
    while (at := ring.find(b"loge", at + 1)) >= 0:
        length, count = (
            int.from_bytes(ring[at + 8 : at + 12], "little"),
            int.from_bytes(ring[at + 24 : at + 28], "little"),
        )
        if at % _PAGE or count > _MIB // 32:
            continue
        descriptors = ring[at + 64 : at + 64 + 32 * count]
        pages = sum(descriptors[each : each + 4] == b"desc" for each in range(0, len(descriptors), 32))
        if length != -(-(64 + 32 * count) // _PAGE) * _PAGE + pages * _PAGE:
            return difference.seed.logged
    return False


def vmdk_is_packed(difference: Difference) -> bool:
    """Whether an extent says, or said before it was changed, that its grains are packed or marked."""
    for files in (difference.files, difference.seed.files):
        for content in files.values():
            if content.startswith(b"KDMV") and int.from_bytes(content[8:12], "little") & _PACKED_FLAGS:
                return True
    return False


def _both(difference: Difference) -> tuple[bytes, bytes]:
    """The mutated image and the sound one."""
    return difference.files[IMAGE], difference.seed.files[IMAGE]
