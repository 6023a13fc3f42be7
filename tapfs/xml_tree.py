"""XML of strangers as a tree of elements without namespaces: no entities, no document type, a bounded depth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NoReturn
from xml.parsers import expat

from tapfs.errors import ImageError
from tapfs.records import dataclass, field

_MOST_DEPTH = 200
_MOST_ELEMENTS = 1 << 20


@dataclass(slots=True)
class Element:
    """An element: names of elements and attributes are without their namespace."""

    name: str
    attributes: dict[str, str]
    children: list[Element] = field(default_factory=list["Element"])
    pieces: list[str] = field(default_factory=list[str])

    @property
    def text(self) -> str:
        """The text directly in it."""
        return "".join(self.pieces).strip()

    def all(self, *path: str) -> Iterator[Element]:
        """The elements at a path of names below it."""
        if not path:
            yield self
            return
        for child in self.children:
            if child.name == path[0]:
                yield from child.all(*path[1:])

    def first(self, *path: str) -> Element | None:
        """The first of them."""
        return next(self.all(*path), None)


#: Makes the error of a descriptor that is damaged from a message.
Fault = Callable[[str], ImageError]


class _Builder:
    def __init__(self, fault: Fault) -> None:
        self._fault = fault
        self.root: Element | None = None
        self._open: list[Element] = []
        self._count = 0

    def start(self, name: str, attributes: dict[str, str]) -> None:
        self._count += 1
        if self._count > _MOST_ELEMENTS or len(self._open) >= _MOST_DEPTH:
            raise self._fault("has an XML descriptor with too many elements")
        element = Element(_plain(name), {_plain(key): value for key, value in attributes.items()})
        if self._open:
            self._open[-1].children.append(element)
        elif self.root is None:
            self.root = element
        self._open.append(element)

    def end(self, name: str) -> None:
        del name
        self._open.pop()

    def characters(self, text: str) -> None:
        self._open[-1].pieces.append(text)


def parsed(content: bytes, fault: Fault) -> Element:
    """The root of a document. Raises what `fault` makes, also for one with a document type or entities."""

    def refuse(*_: object) -> NoReturn:
        raise fault("has an XML descriptor with a document type or entities, which no descriptor needs")

    parser = expat.ParserCreate(namespace_separator=" ")
    parser.buffer_text = True
    builder = _Builder(fault)
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.characters
    # Without a document type there are no entities but the five of XML: none that grow, none from elsewhere.
    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    parser.ExternalEntityRefHandler = refuse
    try:
        parser.Parse(content, True)
    except (expat.ExpatError, ValueError, LookupError) as error:
        raise fault(f"has a descriptor that is no XML: {error}") from error
    if builder.root is None:
        raise fault("has an empty descriptor")
    return builder.root


def _plain(name: str) -> str:
    return name.rpartition(" ")[2]
