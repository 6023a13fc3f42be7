"""The format extension of a Parallels image: one cluster, which says where dirty bitmaps are.

docs/specs/parallels.md, "Format extension". The bitmaps say nothing about the disk; a check must not call their
clusters leaked.
"""

from __future__ import annotations

import hashlib
import struct
from array import array

from tapfs.driver import HostFile
from tapfs.formats.changed_table import decode
from tapfs.formats.parallels.header import SECTOR, Header
from tapfs.records import dataclass, field

_MAGIC = 0xAB234CEF23DCEA87
_DIRTY_BITMAP = 0x20385FAE252CB34A
_HEAD = struct.Struct("<Q16s")
_FEATURE = struct.Struct("<QQII")
_BITMAP = struct.Struct("<Q16sII")

#: Entries of a bitmap's table that are no place: all bits are 0, all bits are 1.
_ALL_CLEAR, _ALL_SET = 0, 1


@dataclass(slots=True)
class Extension:
    """The host offsets of the clusters that it names, all in the file, and the damage that it has, if any.

    `present`: the extension itself lies in the file.
    """

    present: bool = True
    clusters: list[int] = field(default_factory=list[int])
    bitmaps: int = 0
    fault: str | None = None


def read_extension(file: HostFile, header: Header) -> Extension | None:
    """The extension of an image; None where there is none."""
    if header.extension_offset == 0:
        return None
    found = Extension()
    last_place = file.size() - header.cluster_bytes
    if header.extension_offset > last_place:
        return Extension(present=False, fault="the format extension lies past the end of the file")
    raw = file.read(header.extension_offset, header.cluster_bytes)
    magic, checksum = _HEAD.unpack_from(raw)
    if magic != _MAGIC:
        found.fault = "the format extension does not begin with its magic"
    elif hashlib.md5(raw[_HEAD.size :], usedforsecurity=False).digest() != checksum:
        found.fault = "the checksum of the format extension is wrong"
    else:
        _read_features(raw, found)
        if any(offset > last_place for offset in found.clusters):
            found.fault = "a dirty bitmap lies past the end of the file"
            found.clusters = [offset for offset in found.clusters if offset <= last_place]
    return found


def _read_features(raw: bytes, found: Extension) -> None:
    at = _HEAD.size
    while at + _FEATURE.size <= len(raw):
        magic, _, length, _ = _FEATURE.unpack_from(raw, at)
        at += _FEATURE.size
        if magic == 0:
            return
        if at + length > len(raw):
            break
        if magic == _DIRTY_BITMAP and length >= _BITMAP.size:
            *_, entries = _BITMAP.unpack_from(raw, at)
            table = raw[at + _BITMAP.size : at + length][: 8 * entries]
            words: array[int] = decode(table[: len(table) & ~7], "Q", "little")
            found.clusters += [word * SECTOR for word in words if word not in {_ALL_CLEAR, _ALL_SET}]
            found.bitmaps += 1
        at += -(-length // 8) * 8
    found.fault = "the format extension has no end"
