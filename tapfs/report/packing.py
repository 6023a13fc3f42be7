"""A picture of a disk as text for a page: variable-length numbers in base64, cut to so many bytes.

The script of the page (`page.js`) unpacks it. A number is written in groups of seven bits, the lowest first, of which
all but the last have the eighth bit set.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from typing import NamedTuple

from tapfs.report.picture import COLUMNS, Picture, Run

#: In the first byte of a run, above its column: its place in the file follows, as a difference.
_PLACED = 1 << 4

#: The parts that a bin is divided into.
_WHOLE = 255


class PackedPicture(NamedTuple):
    """A picture as base64: `runs`, or else `bins` of `width` bytes; and the grid of disk against file.

    Offsets and lengths of runs are multiples of ``1 << shift``.
    """

    width: int
    shift: int
    runs: str | None
    bins: str | None
    grid: str


def packed_picture(picture: Picture, most_bytes: int) -> PackedPicture:
    """The picture in at most `most_bytes` bytes of base64, besides the grid: all runs if they fit, else fewer bins."""
    grid = _text(packed_grid(picture.cells))
    limit = most_bytes * 3 // 4
    if picture.runs is not None:
        shift = _common_shift(picture.runs)
        runs = packed_runs(picture.runs, shift)
        if len(runs) <= limit:
            return PackedPicture(picture.width, shift, _text(runs), None, grid)
    width, bins = picture.width, picture.bins
    while len(packed := packed_bins(bins, width, picture.size)) > limit and len(bins) > 1:
        width, bins = width * 2, _halved(bins)
    return PackedPicture(width, 0, None, _text(packed), grid)


def packed_runs(runs: Sequence[Run], shift: int) -> bytes:
    """Each run: column and flag, length, and the distance of its place from the end of the place before."""
    out = bytearray()
    expected = 0
    for run in runs:
        out.append(run.column | (0 if run.host_offset is None else _PLACED))
        _put(out, run.length >> shift)
        if run.host_offset is not None:
            distance = (run.host_offset >> shift) - expected
            _put(out, distance << 1 if distance >= 0 else (-distance << 1) - 1)
            expected = (run.host_offset + run.length) >> shift
    return bytes(out)


def packed_bins(bins: Sequence[Sequence[int]], width: int, size: int) -> bytes:
    """Bins that are alike as one: how many more, a mask of columns, and the parts of all of these but the last."""
    out = bytearray()
    before: bytes | None = None
    repeated = 0
    for number, bin_ in enumerate(bins):
        text = _bin(bin_, min(width, size - number * width))
        if text == before:
            repeated += 1
            continue
        if before is not None:
            _put(out, repeated)
            out += before
        before, repeated = text, 0
    if before is not None:
        _put(out, repeated)
        out += before
    return bytes(out)


def packed_grid(cells: Sequence[int]) -> bytes:
    """Each cell as a level of 0 to 15 by the logarithm of its bytes; levels that are alike as one, with how many."""
    most = max(cells, default=0).bit_length()
    out = bytearray()
    before, count = -1, 0
    for cell in [*cells, None]:
        level = -2 if cell is None else 0 if cell == 0 else max(1, 15 - (most - cell.bit_length()))
        if level == before:
            count += 1
            continue
        if count:
            _put(out, (count - 1) << 4 | before)
        before, count = level, 1
    return bytes(out)


def _bin(columns: Sequence[int], width: int) -> bytes:
    present = [number for number in range(COLUMNS) if columns[number]]
    out = bytearray()
    _put(out, sum(1 << number for number in present))
    for number in present[:-1]:
        out.append(min(_WHOLE, max(1, round(columns[number] * _WHOLE / width))))
    return bytes(out)


def _halved(bins: Sequence[Sequence[int]]) -> list[list[int]]:
    pairs = [[left + right for left, right in zip(a, b, strict=True)] for a, b in zip(bins[::2], bins[1::2])]  # noqa: B905 - an odd one is left
    return [*pairs, list(bins[-1])] if len(bins) % 2 else pairs


def _common_shift(runs: Sequence[Run]) -> int:
    together = 0
    for run in runs:
        together |= run.offset | run.length | (run.host_offset or 0)
    return (together & -together).bit_length() - 1 if together else 0


def _put(out: bytearray, number: int) -> None:
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)


def _text(packed: bytes) -> str:
    return b64encode(packed).decode("ascii")
