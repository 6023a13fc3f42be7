"""Parse a VMDK descriptor: the text that names the parts of a disk, its parent and its identity.

People and many tools write descriptors by hand, so the parser takes what VMware's own takes and more: CRLF, tabs, any
case, no quotes, no comments, a byte order mark (docs/specs/vmdk.md, "Descriptor"). It keeps the places of the values,
so that a value can be changed without touching another byte. A line that begins like an extent and is none is an error:
a disk without it would be shorter, and all behind it would have moved.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from enum import Enum

from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.vmdk.sectors import MAX_BYTES, SECTOR
from tapfs.formats.vmdk.signature import BYTE_ORDER_MARK, is_descriptor, is_utf16
from tapfs.formats.vmdk.text_encoding import codec_named, decoded
from tapfs.patterns import pattern
from tapfs.records import NamedTuple, dataclass

#: Longest descriptor that is read, in bytes, and the most extents of one disk.
MAX_BYTES_OF_TEXT = 1 << 20
MAX_EXTENTS = 4096

#: CID of no image: a parentCID with this value says that there is no parent.
NO_CID = 0xFFFFFFFF

_EXTENT = pattern(
    rb"(?P<access>rw|rdonly|noaccess)[ \t]+(?P<sectors>[0-9]{1,20})[ \t]+(?P<kind>[a-z]+)"
    rb'(?:[ \t]+(?:"(?P<quoted>[^"]*)"(?:[ \t]+(?P<offset>[0-9]{1,20})(?P<rest>[ \t].*)?)?'
    # A name without quotes may have blanks in it; a number behind it is the offset.
    rb'|(?P<plain>[^\s"](?:[^"]*?[^\s"])??)(?:[ \t]+(?P<plain_offset>[0-9]{1,20}))?))?',
    re.IGNORECASE,
)
_LIKE_AN_EXTENT = pattern(rb"(?:rw|rdonly|noaccess)(?:[ \t]|$)", re.IGNORECASE)
_EXTENT_ANYWHERE = pattern(rb"^[ \t]*(?:rw|rdonly|noaccess)[ \t]", re.IGNORECASE | re.MULTILINE)
#: A line without the sign of a key that has a number and the word of a kind: an extent once, before it was damaged.
_MAYBE_AN_EXTENT = pattern(
    rb"[^=]*?[0-9]+[ \t]+(?:flat|sparse|zero|vmfs|vmfssparse|vmfsrdm|vmfsraw|sesparse)\b", re.IGNORECASE
)
_KEY = pattern(
    rb"(?P<key>[a-z][a-z0-9_.]*)[ \t]*=[ \t]*(?:\"(?P<quoted>[^\"]*)\"?|(?P<plain>.*?))[ \t]*$", re.IGNORECASE
)
_CID = pattern(rb"[0-9a-f]{1,8}", re.IGNORECASE)
#: A comment of tapfs, while the parent is written (`tapfs.formats.vmdk.rebase`).
SECOND_PARENT = b"#parentCID2="
_SECOND_PARENT = pattern(rb"^" + SECOND_PARENT + rb"([0-9a-f]{8})\r?$", re.MULTILINE)


class Access(Enum):
    """What a guest may do with a part of the disk."""

    READ_WRITE = "RW"
    READ_ONLY = "RDONLY"
    NONE = "NOACCESS"


class Value(NamedTuple):
    """The value of a key and the place of its bytes in the text, without quotes."""

    at: int
    content: bytes


class ExtentLine(NamedTuple):
    """One extent: `sectors` of the disk, and their place. `kind` is in upper case, `name` empty where there is none."""

    access: Access
    sectors: int
    kind: str
    name: str
    raw_name: bytes
    offset_sectors: int
    at: int

    @property
    def length(self) -> int:
        """Bytes of the disk that the extent has."""
        return self.sectors * SECTOR


class SecondCid(NamedTuple):
    """A content ID in the comment of a descriptor, None where it says nothing; `at` as in `Value`."""

    at: int
    cid: int | None


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A parsed descriptor. `values` has the keys in lower case, of a key that stands twice the first value.

    Places are byte offsets from the start of the text, which stands at `base` of its host file.
    """

    text: bytes
    base: int
    codec: str
    values: Mapping[str, Value]
    extents: tuple[ExtentLine, ...]
    repeated_keys: tuple[str, ...]

    def value(self, key: str) -> str:
        """The value of a key, whose case does not matter; empty where there is none."""
        found = self.values.get(key.lower())
        return "" if found is None else decoded(found.content, self.codec)

    @property
    def cid(self) -> int | None:
        """The content ID; None where the descriptor has none."""
        return self._number("cid")

    @property
    def parent_cid(self) -> int | None:
        """The content ID that the parent must have; None where there is no parent."""
        number = self._number("parentcid")
        return None if number == NO_CID else number

    @property
    def second_parent_cid(self) -> SecondCid | None:
        """The place of another content ID that the parent may have, and that ID; in a comment that tapfs writes."""
        found = _SECOND_PARENT.search(self.text)
        if found is None:
            return None
        number = int(found[1], 16)
        return SecondCid(found.start(1), None if number == NO_CID else number)

    @property
    def parent_name(self) -> str:
        """The parent's name as the descriptor has it; empty where it has none."""
        return self.value("parentfilenamehint")

    @property
    def create_type(self) -> str:
        """What the disk was created as, for people: the extents say what it is."""
        return self.value("createtype")

    def _number(self, key: str) -> int | None:
        found = self.values.get(key)
        return None if found is None or _CID.fullmatch(found.content) is None else int(found.content, 16)


def parse_descriptor(raw: bytes, path: str, base: int = 0) -> Descriptor:
    """The descriptor in `raw`, which stands at `base` of the host file `path` and ends at its first NUL.

    One behind the start of its file is embedded, and may begin with any of its lines: a header says what it is. Raises
    ImageError: invalid_format for a text that is no descriptor, unsupported for one in UTF-16, out_of_bounds beyond the
    limits, corrupt for an extent or a content ID that cannot be understood, and where there are no extents.
    """
    if is_utf16(raw) and is_descriptor(raw):
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            "is a descriptor in UTF-16, which VMware does not read",
            path=path,
            offset=base,
            op="open",
            remedy="save it as UTF-8",
        )
    text = raw.split(b"\0", 1)[0]
    if len(text) > MAX_BYTES_OF_TEXT:
        message = f"the descriptor is longer than {MAX_BYTES_OF_TEXT} bytes"
        raise ImageError(ErrorKind.OUT_OF_BOUNDS, message, path=path, offset=base, op="open")
    if not is_descriptor(text) and not (base and _EXTENT_ANYWHERE.search(text)):
        message = "not a VMDK descriptor: it begins neither with # Disk DescriptorFile nor with version="
        raise ImageError(ErrorKind.INVALID_FORMAT, message, path=path, offset=base, op="open")
    values: dict[str, Value] = {}
    repeated: list[str] = []
    lines: list[tuple[int, re.Match[bytes]]] = []
    for at, line in _lines(text):
        if _LIKE_AN_EXTENT.match(line):
            lines.append((at, _extent_match(line, path, base + at)))
        elif _MAYBE_AN_EXTENT.match(line):
            raise _misunderstood(line, path, base + at)
        elif (found := _KEY.match(line)) is not None:
            key = found["key"].decode("ascii").lower()
            if key in values:
                repeated.append(key)
                continue
            group = "plain" if found["quoted"] is None else "quoted"
            values[key] = Value(at + found.start(group), found[group])
    if not lines:
        raise ImageError(ErrorKind.CORRUPT, "the descriptor names no extents", path=path, offset=base, op="open")
    if len(lines) > MAX_EXTENTS:
        message = f"the descriptor names {len(lines)} extents, the limit is {MAX_EXTENTS}"
        raise ImageError(ErrorKind.OUT_OF_BOUNDS, message, path=path, offset=base, op="open")
    _check_cids(values, path, base)
    named = values.get("encoding")
    codec = codec_named("" if named is None else named.content.decode("ascii", "replace"), text)
    extents = tuple(_extent(found, at, codec) for at, found in lines)
    if sum(line.sectors for line in extents) * SECTOR >= MAX_BYTES:
        message = "the extents of the descriptor are larger than any disk"
        raise ImageError(ErrorKind.OUT_OF_BOUNDS, message, path=path, offset=base, op="open")
    return Descriptor(text, base, codec, values, extents, tuple(repeated))


def _lines(text: bytes) -> Iterator[tuple[int, bytes]]:
    """Each line that says something, without the blanks around it, and where it starts."""
    at = len(BYTE_ORDER_MARK) if text.startswith(BYTE_ORDER_MARK) else 0
    for whole in text[at:].splitlines(keepends=True):
        line = whole.strip()
        if line and not line.startswith(b"#"):
            yield at + len(whole) - len(whole.lstrip()), line
        at += len(whole)


def _extent_match(line: bytes, path: str, offset: int) -> re.Match[bytes]:
    found = _EXTENT.fullmatch(line)
    if found is None:
        raise _misunderstood(line, path, offset)
    return found


def _misunderstood(line: bytes, path: str, offset: int) -> ImageError:
    shown = line[:80].decode("utf-8", "replace")
    message = f"an extent of the descriptor cannot be understood: {shown!r}"
    return ImageError(ErrorKind.CORRUPT, message, path=path, offset=offset, op="open")


def _extent(found: re.Match[bytes], at: int, codec: str) -> ExtentLine:
    raw_name = found["quoted"] if found["quoted"] is not None else found["plain"] or b""
    return ExtentLine(
        Access(found["access"].decode("ascii").upper()),
        int(found["sectors"]),
        found["kind"].decode("ascii").upper(),
        decoded(raw_name, codec),
        raw_name,
        int(found["offset"] or found["plain_offset"] or 0),
        at,
    )


def _check_cids(values: Mapping[str, Value], path: str, base: int) -> None:
    for key in ("cid", "parentcid"):
        found = values.get(key)
        if found is not None and _CID.fullmatch(found.content) is None:
            shown = found.content[:40].decode("utf-8", "replace")
            message = f"the {key} of the descriptor is no number of 8 hexadecimal digits: {shown!r}"
            raise ImageError(ErrorKind.CORRUPT, message, path=path, offset=base + found.at, op="open")
