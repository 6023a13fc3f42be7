"""The text encoding of a descriptor: the key `encoding` names it, and where it does not the bytes tell.

docs/specs/vmdk.md, "Descriptor". A codec is taken from a list, because Python has codecs that are no text encodings.
"""

from __future__ import annotations

#: Families of encodings: a number comes behind these letters.
_FAMILIES = (
    "windows-125",
    "cp125",
    "iso-8859-",
    "koi8-",
    "euc-",
    "gb",
    "big5",
    "shift-jis",
    "utf-8",
    "utf8",
)
_SINGLE = frozenset({"ascii", "us-ascii", "cp932", "cp936", "cp949", "cp950", "ms932", "sjis", "latin1", "latin-1"})

#: Bytes that are no UTF-8 are taken for this, unless the descriptor says more.
FALLBACK = "windows-1252"

DEFAULT = "utf-8"


def codec_named(name: str, text: bytes) -> str:
    """Python's name of the encoding that a descriptor calls `name`; of an unknown one what fits the bytes `text`."""
    wanted = name.strip().lower().replace("_", "-")
    if wanted in _SINGLE or wanted.startswith(_FAMILIES):
        try:
            b"".decode(wanted)
        except LookupError:
            pass
        else:
            return wanted
    try:
        text.decode(DEFAULT)
    except UnicodeDecodeError:
        return FALLBACK
    return DEFAULT


def decoded(value: bytes, codec: str) -> str:
    """The text of some bytes; bytes that are none in this encoding stand for themselves, as in names of files."""
    try:
        return value.decode(codec)
    except UnicodeDecodeError:
        return value.decode(DEFAULT, "surrogateescape")


def literal(value: bytes) -> str:
    """The name of a host file that has exactly these bytes."""
    return value.decode(DEFAULT, "surrogateescape")
