"""Change the head of a qcow2 image: header, extensions and backing name, written so that no crash can tear them.

The fields of the header lie in the first sector of the file, but extensions and the backing name may lie behind it. A
head that differs in its first sector alone is one write. Any other goes through a copy: the whole head is written
behind the old one, an extension of an unknown type leads from the first sector to that copy, then the head itself is
written, and the first sector leads to it again. Readers skip extensions that they do not know.
"""

from __future__ import annotations

from collections.abc import Sequence

from tapfs.formats.qcow2 import extensions as ext
from tapfs.formats.qcow2.header import COMPRESSION_TYPE_AT, LEAST_LENGTH_3, LENGTH_2, Header
from tapfs.formats.qcow2.signature import VERSIONS
from tapfs.formats.rounding import round_up
from tapfs.plan import Plan, Step, Write, plan

_SECTOR = 512
#: The type of the extension that leads to the copy of a head: "tapf".
_DETOUR = 0x74617066
_PREFIX_BYTES = 8


def head_plan(
    header: Header,
    head: bytes,
    extensions: Sequence[ext.Extension],
    changed: Header,
    kept: Sequence[ext.Extension],
    name: bytes,
) -> Plan | None:
    """The plan that replaces the first cluster, `head`, of an image with `header` and `extensions`.

    It then has the header `changed`, the extensions `kept` and the backing name `name`, b"" for none. The version and
    the length of the header may be others. None: there is no room for that in the first cluster.
    """
    area = ext.pack_extensions(kept)
    start = changed.header_length or LENGTH_2
    new = _front(header, head, changed, start + len(area), name) + area + name
    if len(new) > header.cluster_size:
        return None
    new += head[len(new) : round_up(len(new), _SECTOR)]
    if new[_SECTOR:] == head[_SECTOR : len(new)]:
        return plan([Write(0, 0, new[:_SECTOR])])
    copy_at = round_up(max(len(new), _end(header, extensions)), _SECTOR)
    detour_at = copy_at - start - _PREFIX_BYTES
    detour = ext.Extension(_DETOUR, b"").pack()[:4] + detour_at.to_bytes(4, "big")
    if start + _PREFIX_BYTES > _SECTOR or copy_at + len(area) + len(name) > header.cluster_size:
        return None
    led = _front(header, head, changed, copy_at + len(area), name) + detour + head[start + _PREFIX_BYTES : _SECTOR]
    behind: list[Step] = [Write(0, _SECTOR, new[_SECTOR:])]
    return plan([Write(0, copy_at, area + name)], [Write(0, 0, led)], behind, [Write(0, 0, new[:_SECTOR])])


def _front(header: Header, head: bytes, changed: Header, name_at: int, name: bytes) -> bytes:
    """The header `changed` as bytes, which says where the name is. Fields that nobody here knows stay."""
    packed = changed._replace(backing_offset=name_at if name else 0, backing_size=len(name)).pack()
    if changed.version == VERSIONS[0]:
        return packed
    known = LEAST_LENGTH_3 if changed.header_length <= COMPRESSION_TYPE_AT else COMPRESSION_TYPE_AT + 1
    unknown = head[known : header.header_length] if header.version > VERSIONS[0] else b""
    return (packed[:known] + unknown).ljust(changed.header_length, b"\0")[: changed.header_length]


def _end(header: Header, extensions: Sequence[ext.Extension]) -> int:
    """The end of what the first cluster holds now."""
    ends = [header.header_length or LENGTH_2, *(each.offset + round_up(len(each.data), 8) for each in extensions)]
    return max(*ends, header.backing_offset + header.backing_size) + _PREFIX_BYTES
