"""A bar of a disk for a terminal: in each character how much of its piece is data, and in its colour whose."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, NamedTuple

from tapfs.cli.sizes import human_size
from tapfs.errors import ImageError, printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from tapfs.disk.image import Image

#: The widest bar: a wider one is harder to read, and says little more.
_WIDEST = 160
_NARROWEST = 20

#: Colours of layers from the top on; those below share the last one.
_COLOURS = (34, 33, 32, 35, 36, 31)


class Signs(NamedTuple):
    """The characters of a bar: heights of data from little to all, then one for each other kind."""

    heights: str
    packed: str
    zeros: str
    empty: str
    unknown: str
    ends: tuple[str, str]


UNICODE = Signs("▁▂▃▄▅▆▇█", "▒", "░", "·", "?", ("▕", "▏"))
ASCII = Signs(".-=#", "%", "0", " ", "?", ("[", "]"))


def print_bar(image: Image, offset: int, length: int) -> None:
    """Print the bar, its ends and its legend on the terminal; nothing if the map has a fault, which the table tells."""
    if not length:
        return
    columns = _columns()
    width = min(_WIDEST, columns - 2)
    if width < _NARROWEST:
        return
    from tapfs.report.picture import column_bytes

    try:
        pieces = column_bytes(image, offset, length, width)
    except ImageError:
        return
    paths = [printable(os.path.basename(layer.path)) for layer in image.layers]
    signs = UNICODE if _encodes(UNICODE) else ASCII
    for line in lines(pieces, offset, length, paths, signs, colour=_has_colour(os.environ), columns=columns):
        sys.stdout.write(f"{line}\n")


def lines(
    pieces: Sequence[Sequence[int]],
    offset: int,
    length: int,
    names: Sequence[str],
    signs: Signs,
    *,
    colour: bool,
    columns: int,
) -> Iterator[str]:
    """The lines of the bar of ``[offset, offset + length)``, and an empty one. `names` are those of the chain."""
    pieces = [piece for piece in pieces if any(piece)]
    start, end = human_size(offset), human_size(offset + length)
    yield f" {start}{end.rjust(len(pieces) - len(start))}"
    cells = [_cell(piece, signs) for piece in pieces]
    yield signs.ends[0] + "".join(_painted(sign, depth, colour=colour) for sign, depth in cells) + signs.ends[1]
    if not colour and len(names) > 1:
        yield " " + "".join(" " if depth is None else str(min(depth, 9)) for _, depth in cells)
    yield from _wrapped(list(_legend(pieces, names, signs, colour=colour)), columns)
    yield ""


def _cell(piece: Sequence[int], signs: Signs) -> tuple[str, int | None]:
    """The character of a piece, and the layer that gives most of its data."""
    from tapfs.report.picture import DAMAGED, LAYERS, UNKNOWN, ZEROS, depth_of

    data = sum(piece[:ZEROS])
    if piece[UNKNOWN] + piece[DAMAGED] > data:
        return signs.unknown, None
    if not data:
        return (signs.zeros if piece[ZEROS] * 2 >= sum(piece) else signs.empty), None
    most = max(range(ZEROS), key=lambda column: piece[column])
    height = min(len(signs.heights) - 1, data * len(signs.heights) // sum(piece))
    return (signs.packed if most >= LAYERS else signs.heights[height]), depth_of(most)


def _painted(sign: str, depth: int | None, *, colour: bool) -> str:
    if not colour:
        return sign
    return f"\x1b[{2 if depth is None else _COLOURS[depth]}m{sign}\x1b[0m"


def _legend(
    pieces: Sequence[Sequence[int]], names: Sequence[str], signs: Signs, *, colour: bool
) -> Iterator[tuple[str, str]]:
    """Each kind that there is: its sign, and its name with the bytes that it has."""
    from tapfs.report.picture import DAMAGED, EMPTY, LAYERS, UNKNOWN, ZEROS, depth_of

    totals = [sum(column) for column in zip(*pieces, strict=True)]
    for column in sorted(range(ZEROS), key=lambda each: (each % LAYERS, each)):
        if totals[column]:
            depth = depth_of(column) or 0
            sign = signs.packed if column >= LAYERS else signs.heights[-1]
            kind = "compressed" if column >= LAYERS else "data"
            of = f" of {names[depth]}" if 1 < len(names) > depth else ""
            shown = sign if colour or len(names) == 1 else f"{sign}{depth}"
            yield _painted(shown, depth, colour=colour), f" {kind}{of} {human_size(totals[column])}"
    others = ((signs.zeros, "zeros", ZEROS), (signs.empty, "never written", EMPTY))
    for sign, kind, column in (*others, (signs.unknown, "unknown", UNKNOWN), (signs.unknown, "damaged", DAMAGED)):
        if totals[column]:
            yield _painted(sign, None, colour=colour), f" {kind} {human_size(totals[column])}"


def _wrapped(entries: Sequence[tuple[str, str]], columns: int) -> Iterator[str]:
    line, used = "", 0
    for sign, text in entries:
        wide = 2 + len(text)  # of a sign what is seen
        if line and used + wide + 2 > columns:
            yield line
            line, used = "", 0
        line += f"{'  ' if line else ' '}{sign}{text}"
        used += wide + 2
    if line:
        yield line


def _columns() -> int:
    """The width of the terminal; one that does not say it has 80 characters a line."""
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or 80
    except OSError:
        return 80


def _encodes(signs: Signs) -> bool:
    try:
        "".join((signs.heights, signs.packed, signs.zeros, signs.empty, *signs.ends)).encode(sys.stdout.encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _has_colour(environment: Mapping[str, str]) -> bool:
    """Whether the terminal has colours and its user has not refused them (no-color.org)."""
    return not environment.get("NO_COLOR") and environment.get("TERM", "dumb") != "dumb"
