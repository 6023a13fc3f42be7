"""Give a qcow2 image another parent: the head of its first cluster, written so that no crash can tear it.

The fields of the header lie in the first sector of the file, but extensions and the backing name may lie behind it. A
head that differs in its first sector alone is one write. Any other goes through a copy: the whole head is written
behind the old one, an extension of an unknown type leads from the first sector to that copy, then the head itself is
written, and the first sector leads to it again. Readers skip extensions that they do not know.
"""

from __future__ import annotations

from collections.abc import Sequence

from tapfs.driver import BackingReference
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.qcow2 import extensions as ext
from tapfs.formats.qcow2.backing import format_word
from tapfs.formats.qcow2.header import (
    AUTOCLEAR_AT,
    KNOWN_AUTOCLEAR,
    LENGTH_2,
    MAX_NAME_LENGTH,
    RAW_DATA_FILE,
    WORD,
    Header,
)
from tapfs.formats.qcow2.signature import VERSIONS
from tapfs.formats.rounding import round_up
from tapfs.plan import Plan, Step, Write, plan

_SECTOR = 512
#: The type of the extension that leads to the copy of a head: "tapf".
_DETOUR = 0x74617066
_PREFIX_BYTES = 8


def rebase_plan(
    header: Header, head: bytes, extensions: Sequence[ext.Extension], backing: BackingReference | None, path: str
) -> Plan:
    """The plan that has the image, whose first cluster is `head`, name another parent, or none.

    The bits of unknown autoclear features are cleared with it, as by every change.
    Raises ImageError: out_of_bounds for a name that is too long, unsupported for an image that can have no parent.
    """
    name = b"" if backing is None else _name_bytes(backing.name, path)
    if backing is not None and header.autoclear & RAW_DATA_FILE:
        message = "an image whose data file is a raw disk by itself can have no backing file"
        raise ImageError(ErrorKind.UNSUPPORTED, message, path=path, op="rebase")
    kept = [each for each in extensions if each.type != ext.BACKING_FORMAT]
    if backing is not None and backing.format is not None:
        kept.insert(0, ext.Extension(ext.BACKING_FORMAT, format_word(backing.format).encode()))
    area = ext.pack_extensions(kept)
    start = header.header_length or LENGTH_2
    new = _head(header, head, start, area, name)
    if len(new) > header.cluster_size:
        raise _too_long(name, path)
    if new[_SECTOR:] == head[_SECTOR : len(new)]:
        return plan([Write(0, 0, new[:_SECTOR])])
    copy_at = round_up(max(len(new), _end(header, extensions)), _SECTOR)
    detour_at = copy_at - start - _PREFIX_BYTES
    detour = ext.Extension(_DETOUR, b"").pack()[:4] + detour_at.to_bytes(4, "big")
    if start + _PREFIX_BYTES > _SECTOR or copy_at + len(area) + len(name) > header.cluster_size:
        raise _too_long(name, path)
    led = _fields(header, head[:_SECTOR], copy_at + len(area), name)
    led = led[:start] + detour + led[start + _PREFIX_BYTES :]
    behind: list[Step] = [Write(0, _SECTOR, new[_SECTOR:])]
    return plan([Write(0, copy_at, area + name)], [Write(0, 0, led)], behind, [Write(0, 0, new[:_SECTOR])])


def _head(header: Header, head: bytes, start: int, area: bytes, name: bytes) -> bytes:
    """Header, extensions and name, one behind the other, in whole sectors."""
    new = head[:start] + area
    new = _fields(header, new, len(new), name) + name
    return new + head[len(new) : round_up(len(new), _SECTOR)]


def _fields(header: Header, head: bytes, name_at: int, name: bytes) -> bytes:
    """A head whose header says where the name is."""
    changed = header._replace(backing_offset=name_at if name else 0, backing_size=len(name)).pack()
    if header.version == VERSIONS[0]:
        return changed[:LENGTH_2] + head[LENGTH_2:]
    known = (header.autoclear & KNOWN_AUTOCLEAR).to_bytes(WORD, "big")
    return changed[:LENGTH_2] + head[LENGTH_2:AUTOCLEAR_AT] + known + head[AUTOCLEAR_AT + WORD :]


def _end(header: Header, extensions: Sequence[ext.Extension]) -> int:
    """The end of what the first cluster holds now."""
    ends = [header.header_length or LENGTH_2, *(each.offset + round_up(len(each.data), 8) for each in extensions)]
    return max(*ends, header.backing_offset + header.backing_size) + _PREFIX_BYTES


def _name_bytes(name: str, path: str) -> bytes:
    raw = name.encode("utf-8", "surrogateescape")
    if len(raw) > MAX_NAME_LENGTH:
        raise _too_long(raw, path)
    if not raw or b"\0" in raw:
        message = "the backing file's name is empty or holds a NUL byte"
        raise ImageError(ErrorKind.UNSUPPORTED, message, path=path, op="rebase")
    return raw


def _too_long(name: bytes, path: str) -> ImageError:
    message = f"has no room for a backing file's name of {len(name)} bytes"
    return ImageError(ErrorKind.OUT_OF_BOUNDS, message, path=path, op="rebase", remedy="give it a shorter name")
