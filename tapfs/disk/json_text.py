r"""JSON for other programs: always valid Unicode, also where a file name is not.

Names on Linux are bytes. Python keeps those that are no UTF-8 as lone surrogates, which JSON parsers of other
languages refuse. A string of an object with such bytes is written with U+FFFD in their place, and the bytes
themselves stand beside it in base64: `"path": "a\ufffd.raw", "path_base64": "Yf8ucmF3"`.

Each document, and each object of a list that is one, has a `version`. docs/json describes every key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

#: It changes when a key goes away or changes its meaning, not when one comes.
VERSION = 1


def json_text(value: Mapping[str, object] | Sequence[Mapping[str, object]]) -> str:
    """A JSON document of several lines, without the newline at its end: an object, or a list of them."""
    import json  # only those who want it pay for it

    document = _versioned(value) if isinstance(value, Mapping) else [_versioned(each) for each in value]
    return json.dumps(document, indent=2)


def _versioned(value: Mapping[str, object]) -> object:
    return unicode_value({"version": VERSION, **value})


def unicode_value(value: object) -> object:
    """A value whose strings all are valid Unicode; what they were stands beside them, where an object has them."""
    if isinstance(value, str):
        return _replaced(value)
    if isinstance(value, Mapping):
        members: dict[str, object] = {}
        for key, member in cast("Mapping[str, object]", value).items():
            members[key] = unicode_value(member)
            if isinstance(member, str) and members[key] != member:
                members[f"{key}_base64"] = _base64(member)
        return members
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [unicode_value(item) for item in cast("Sequence[object]", value)]
    return value


def _replaced(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return _bytes(text).decode("utf-8", "replace")
    return text


def _base64(text: str) -> str:
    from base64 import b64encode

    return b64encode(_bytes(text)).decode()


def _bytes(text: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # a surrogate that is not of a file name
        return text.encode("utf-8", "surrogatepass")
