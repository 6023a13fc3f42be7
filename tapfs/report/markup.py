"""HTML from elements and texts: whatever is no markup yet is escaped, so no text of an image becomes markup."""

from __future__ import annotations

import json
from collections.abc import Iterable
from html import escape

from tapfs.errors import printable


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Child = str | Iterable["Child"]

#: Elements without an end.
_VOID = {"meta"}


def element(name: str, /, *children: Child, **attributes: str | int | bool | None) -> Markup:
    """An element. In names of attributes `_` is `-`, at their end nothing; None and False: no such attribute."""
    words = [name]
    for key, value in attributes.items():
        if value is not None and value is not False:
            spelled = key.rstrip("_").replace("_", "-")
            words.append(spelled if value is True else f'{spelled}="{escape(printable(str(value)))}"')
    start = f"<{' '.join(words)}>"
    return Markup(start if name in _VOID else f"{start}{joined(children)}</{name}>")


def joined(children: Iterable[Child]) -> Markup:
    """What these are one behind the other."""
    return Markup("".join(map(_markup, children)))


def data_script(value: object) -> Markup:
    """Data for the script of the page. Nothing in them ends the element or begins a comment."""
    text = json.dumps(value, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(f'<script type="application/json">{text}</script>')


def table(head: Iterable[tuple[str, bool]], rows: Iterable[Markup], *, caption: str = "", class_: str = "") -> Markup:
    """A table with a row of headings, each with whether its column has numbers."""
    headings = [element("th", title, scope="col", class_="n" if numbers else None) for title, numbers in head]
    return element(
        "table",
        element("caption", caption) if caption else "",
        element("thead", element("tr", headings)),
        element("tbody", rows),
        class_=class_ or None,
    )


def number(text: Child) -> Markup:
    """A cell with a number."""
    return element("td", text, class_="n")


def _markup(child: Child) -> str:
    if isinstance(child, Markup):
        return child
    return escape(printable(child)) if isinstance(child, str) else joined(child)
