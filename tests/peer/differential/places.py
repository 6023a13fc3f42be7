"""The fields of headers and the entries of tables of a sound image, by their places: what a mutation changes."""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tests.peer.differential.seeds import Seed
from tests.peer.qcow2_damage.anatomy import Anatomy
from tests.peer.qcow2_damage.sound import IMAGE

SECTOR = 512


class Place(NamedTuple):
    """A number in a file: where it stands, its bytes, and their order."""

    file: str
    at: int
    width: int
    order: str = "little"

    def get(self, files: dict[str, bytearray]) -> int:
        """The number."""
        raw = files[self.file][self.at : self.at + self.width]
        return int.from_bytes(raw, "little" if self.order == "little" else "big")

    def put(self, files: dict[str, bytearray], number: int) -> None:
        """Set the number, if the file is long enough to have it."""
        raw = (number % (1 << 8 * self.width)).to_bytes(self.width, "little" if self.order == "little" else "big")
        if self.at + self.width <= len(files[self.file]):
            files[self.file][self.at : self.at + self.width] = raw


class Places(NamedTuple):
    """The fields of headers, and the tables with their entries in order."""

    fields: list[Place]
    tables: list[list[Place]]


def places(name: str, seed: Seed) -> Places:
    """Those of a sound image."""
    found = Places([], [])
    for file, data in seed.files.items():
        for table, each in _OF_FORMATS[name](file, data):
            if table:
                found.tables.append(each)
            else:
                found.fields.extend(each)
    return found


#: Whether they are the entries of a table, and the places.
_Group = tuple[bool, list[Place]]


def _fields(file: str, at: int, layout: str, order: str = "little") -> _Group:
    """Fields that follow each other: a digit for the bytes of each, a dot for a byte that is none."""
    found: list[Place] = []
    for each in layout:
        if each != ".":
            found.append(Place(file, at, int(each), order))
        at += 1 if each == "." else int(each)
    return False, found


def _table(file: str, at: int, count: int, width: int, order: str = "little") -> _Group:
    return True, [Place(file, at + width * index, width, order) for index in range(count)]


def _qcow2(file: str, data: bytes) -> Iterator[_Group]:
    if file != IMAGE:
        return
    anatomy = Anatomy(bytearray(data))
    yield _fields(file, 4, "484484488448" + ("8884411111111" if anatomy.version > 2 else ""), "big")
    yield False, [Place(file, at + 4 * step, 4, "big") for at in anatomy.extensions.values() for step in range(-2, 6)]
    yield _table(file, anatomy.l1_at, anatomy.l1_entries, 8, "big")
    # Of a table of 2 MiB hardly an entry stands for a part of the disk.
    clusters = -(-anatomy.disk_size // anatomy.cluster) + 8
    for table in anatomy.tables:
        yield _table(file, table, min(anatomy.per_table, clusters) * anatomy.entry // 8, 8, "big")
    yield True, [Place(file, at, 8, "big") for at in anatomy.reftable_used]


def _qcow(file: str, data: bytes) -> Iterator[_Group]:
    if file != IMAGE:
        return
    yield _fields(file, 4, "48448112" + "48", "big")
    bits, l2_bits, at = data[32], data[33], int.from_bytes(data[40:48], "big")
    size = int.from_bytes(data[24:32], "big")
    entries = -(-size >> (bits + l2_bits))
    yield _table(file, at, entries, 8, "big")
    for index in range(entries):
        table = int.from_bytes(data[at + 8 * index : at + 8 * index + 8], "big")
        if 0 < table < len(data):
            yield _table(file, table, 1 << l2_bits, 8, "big")


def _vmdk(file: str, data: bytes) -> Iterator[_Group]:
    if data.startswith(b"COWD"):
        yield _fields(file, 4, "4444444")
        count = int.from_bytes(data[24:28], "little")
        yield from _two_levels(file, data, int.from_bytes(data[20:24], "little"), count, 4096)
    elif data.startswith(b"KDMV"):
        at = data.rfind(b"KDMV")
        for header in {0, at}:
            yield _fields(file, header + 4, "4488884888" + "111112")
        capacity, grain = struct.unpack_from("<QQ", data, 12)
        (entries,) = struct.unpack_from("<I", data, 44)
        for field in (48, 56):
            (directory,) = struct.unpack_from("<Q", data, at + field)
            if directory:
                yield from _two_levels(file, data, directory, -(-capacity // (entries * grain)), entries)
    elif data.startswith(b"\xbe\xba\xfe\xca"):
        yield _fields(file, 0, "8" * 26)
        yield _fields(file, SECTOR, "8888")
        numbers = struct.unpack_from("<26Q", data, 0)
        yield _table(file, numbers[16] * SECTOR, numbers[17] * SECTOR // 8, 8)
        yield _table(file, numbers[18] * SECTOR, numbers[19] * SECTOR // 8, 8)


def _two_levels(file: str, data: bytes, directory: int, count: int, entries: int) -> Iterator[_Group]:
    yield _table(file, directory * SECTOR, count, 4)
    for (table,) in struct.iter_unpack("<I", data[directory * SECTOR : directory * SECTOR + 4 * count]):
        if 0 < table * SECTOR < len(data):
            yield _table(file, table * SECTOR, entries, 4)


def _vhd(file: str, data: bytes) -> Iterator[_Group]:
    footer = "8" + "4484444" + "88" + "211" + "44" + "." * 16 + "11"
    yield _fields(file, len(data) - SECTOR, footer, "big")
    if data.startswith(b"conectix"):
        yield _fields(file, 0, footer, "big")
        yield _fields(file, SECTOR, "88844444", "big")
        (table, _, entries) = struct.unpack_from(">QII", data, SECTOR + 16)
        yield _table(file, table, entries, 4, "big")


def _vhdx(file: str, data: bytes) -> Iterator[_Group]:
    for at in (1 << 16, 2 << 16):
        yield _fields(file, at + 4, "48" + "." * 32 + "88" + "2248")
    for at in (3 << 16, 4 << 16):
        yield _fields(file, at + 4, "444" + ("." * 16 + "844") * 2)
    for found in re.finditer(rb"loge", data[1 << 20 : 2 << 20]):
        at = (1 << 20) + found.start()
        yield _fields(file, at + 4, "4448" + "4" + "...." + "." * 16 + "88")
        (count,) = struct.unpack_from("<I", data, at + 24)
        for index in range(min(count, 4)):
            yield _fields(file, at + 64 + 32 * index, "4488" + "8")
    regions = [struct.unpack_from("<16sQII", data, (3 << 16) + 16 + 32 * index) for index in range(2)]
    for guid, at, length, _ in regions:
        if guid[0] == 0x66:
            yield _table(file, at, min(length // 8, 64), 8)
        else:
            (count,) = struct.unpack_from("<H", data, at + 10)
            for index in range(count):
                yield _fields(file, at + 32 + 32 * index, "88" + "4444")
                (item, size) = struct.unpack_from("<II", data, at + 48 + 32 * index)
                yield _fields(file, at + item, "4" * (size // 4))
            yield _fields(file, at + 10, "2")


def _vdi(file: str, data: bytes) -> Iterator[_Group]:
    yield _fields(file, 64, "4444" + "4" + "." * 256 + "444444" + "4" + "8" + "4444")
    yield _fields(file, 424, "88" + "88")
    (at,) = struct.unpack_from("<I", data, 340)
    yield _table(file, at, struct.unpack_from("<I", data, 384)[0], 4)


def _parallels(file: str, data: bytes) -> Iterator[_Group]:
    yield _fields(file, 0, "88" + "44444" + "8" + "444" + "8")
    yield _table(file, 64, struct.unpack_from("<I", data, 32)[0], 4)


def _qed(file: str, data: bytes) -> Iterator[_Group]:
    if file != IMAGE:
        return
    yield _fields(file, 4, "444" + "88888" + "44")
    cluster, table = struct.unpack_from("<II", data, 4)
    (at,) = struct.unpack_from("<Q", data, 40)
    entries = cluster * table // 8
    yield _table(file, at, entries, 8)
    for (place,) in struct.iter_unpack("<Q", data[at : at + 8 * entries]):
        if place:
            yield _table(file, place, entries, 8)


def _dmg(file: str, data: bytes) -> Iterator[_Group]:
    yield _fields(file, len(data) - SECTOR, "4444" + "8888" + "8" + "44", "big")
    yield _fields(file, len(data) - SECTOR + 216, "88", "big")
    yield _fields(file, len(data) - SECTOR + 488, "48", "big")
    for found in re.finditer(rb"mish", data):
        at = found.start()
        yield _fields(file, at, "448884" + "4", "big")
        count = int.from_bytes(data[at + 200 : at + 204], "big")
        yield _fields(file, at + 200, "4", "big")
        for index in range(count):
            yield _fields(file, at + 204 + 40 * index, "448888", "big")


def _luks(file: str, data: bytes) -> Iterator[_Group]:
    del data
    yield _fields(file, 4, "2" + "8" * 12 + "44" + "." * 52 + "4", "big")
    for slot in range(8):
        yield _fields(file, 208 + 48 * slot, "44" + "." * 32 + "44", "big")


_OF_FORMATS: dict[str, Callable[[str, bytes], Iterator[_Group]]] = {
    "qcow2": _qcow2,
    "qcow": _qcow,
    "vmdk": _vmdk,
    "vhd": _vhd,
    "vhdx": _vhdx,
    "vdi": _vdi,
    "parallels": _parallels,
    "qed": _qed,
    "dmg": _dmg,
    "luks": _luks,
}

#: A property list of a DMG has its tables in this text.
_DATA = re.compile(rb"<data>([A-Za-z0-9+/=\s]*)</data>")


def unpacked_tables(data: bytes) -> list[tuple[int, int, bytearray]]:
    """The tables in the property list of a DMG: where the text of each begins and ends, and its bytes."""
    return [(each.start(1), each.end(1), bytearray(base64.b64decode(each[1]))) for each in _DATA.finditer(data)]
