"""Fields of the JSON area of LUKS2, each with its type: whatever is missing or of another type is a corrupt header."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Iterator
from typing import cast

from tapfs.errors import ErrorKind, ImageError

_MAX_NUMBER = (1 << 63) - 1


class Fields:
    """An object of the JSON area, with its place for messages: "keyslots.0.area"."""

    def __init__(self, value: object, place: str, path: str, offset: int) -> None:
        self._place, self.path, self._offset = place, path, offset
        if not isinstance(value, dict):
            raise self._wrong("is no object")
        self._fields = cast("dict[str, object]", value)

    @property
    def names(self) -> Iterable[str]:
        """The names of its fields."""
        return self._fields

    def _wrong(self, what: str) -> ImageError:
        message = f"the LUKS2 metadata {what}: {self._place or 'the whole of it'}"
        return ImageError(ErrorKind.CORRUPT, message, path=self.path, offset=self._offset, op="open")

    def __contains__(self, name: str) -> bool:
        return name in self._fields

    def inner(self, name: str) -> Fields:
        """The object in a field."""
        return Fields(self._fields.get(name), self._below(name), self.path, self._offset)

    def numbered(self, name: str) -> Iterator[tuple[int, Fields]]:
        """The objects in a field whose names are numbers, in the order of these."""
        found = self.inner(name)
        for key in sorted(found.names, key=lambda key: (len(key), key)):
            if not key.isascii() or not key.isdigit() or len(key) > 4:
                raise self._wrong(f"numbers something by {key[:20]!r}")
            yield int(key), found.inner(key)

    def text(self, name: str) -> str:
        """The string in a field."""
        value = self._fields.get(name)
        if not isinstance(value, str):
            raise self._missing(name, "string")
        return value

    def texts(self, name: str) -> list[str]:
        """The strings in the list in a field."""
        value = self._fields.get(name)
        if not isinstance(value, list) or not all(isinstance(each, str) for each in cast("list[object]", value)):
            raise self._missing(name, "list of strings")
        return cast("list[str]", value)

    def number(self, name: str) -> int:
        """The number in a field, at most 2^63 - 1. Large ones are strings (LUKS2 specification, section 3)."""
        value = self._fields.get(name)
        if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 20:
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MAX_NUMBER:
            raise self._missing(name, "number")
        return value

    def data(self, name: str) -> bytes:
        """The bytes in a field in base64."""
        try:
            return base64.b64decode(self.text(name), validate=True)
        except binascii.Error:
            raise self._missing(name, "base64") from None

    def _missing(self, name: str, kind: str) -> ImageError:
        return self._wrong(f"has no {kind} at {self._below(name)}")

    def _below(self, name: str) -> str:
        return f"{self._place}.{name}" if self._place else name
