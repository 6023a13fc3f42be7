"""The states that clients ask for by BLOCK_STATUS: which ranges of a disk are holes, and which have changed."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from tapfs.driver import BitmapFollower, Bitmapped
from tapfs.errors import ImageError
from tapfs.nbd.messages import MAX_STRING

if TYPE_CHECKING:
    from tapfs.disk.image import Image

#: The context that every export has, and what the names of those of bitmaps begin with.
ALLOCATION, _BITMAP = "base:allocation", "qemu:dirty-bitmap:"

#: The bits of base:allocation, and the one of a bitmap.
_HOLE, _ZERO = 1, 2
_DIRTY = 1

#: Runs in one answer, and ranges of a bitmap that are kept in memory.
_MOST_RUNS, _MOST_RANGES = 2048, 4 << 20

#: A run in the answer to a client that has no longer numbers.
_SHORT_RUN = (1 << 32) - (1 << 20)

#: Contexts that the native server tells apart.
_MOST_CONTEXTS = 32

#: A length and its bits.
State = tuple[int, int]

#: The states of a range of a disk from its start on, of which only the first few are taken.
States = Callable[[int, int], Iterator[State]]


def contexts_of(image: Image) -> dict[str, States]:
    """The metadata contexts of an image by name, in the order of their numbers."""
    found: dict[str, States] = {ALLOCATION: lambda offset, length: _allocation(image, offset, length)}
    layer = image.layers[0]
    driver = layer.driver
    # Bitmaps follow the current disk: a snapshot has none.
    if layer.snapshot is not None or not isinstance(driver, Bitmapped):
        return found
    try:
        bitmaps = driver.bitmaps()
    except ImageError:
        if not image.writable:
            raise
        return found  # the first write says what is wrong
    for bitmap in bitmaps:
        name = f"{_BITMAP}{bitmap.name}"
        if not _can_be_said(name) or len(found) == _MOST_CONTEXTS:
            continue
        if isinstance(driver, BitmapFollower) and driver.follows(bitmap.name):
            found[name] = partial(_marked_now, driver, bitmap.name)
        elif bitmap.consistent and not (image.writable and bitmap.enabled):
            found[name] = DirtyRanges(driver, bitmap.name)
    return found


def _marked_now(driver: BitmapFollower, name: str, offset: int, length: int) -> Iterator[State]:
    """The states of a bitmap that notes writes meanwhile."""
    at, end = offset, offset + length
    for start, marked in driver.followed_ranges(name, offset, length):
        if start > at:
            yield start - at, 0
        yield marked, _DIRTY
        at = start + marked
    if at < end:
        yield end - at, 0


def _can_be_said(name: str) -> bool:
    """Whether the protocol has room for a name, which must be UTF-8 there."""
    try:
        return len(name.encode()) <= MAX_STRING
    except UnicodeEncodeError:
        return False


def first_states(states: Iterable[State], *, single: bool) -> list[State]:
    """The first states, those that are alike merged; `single`: only the first one."""
    runs: list[State] = []
    for length, bits in states:
        if runs and runs[-1][1] == bits and runs[-1][0] + length <= _SHORT_RUN:
            runs[-1] = (runs[-1][0] + length, bits)
            continue
        if len(runs) == (1 if single else _MOST_RUNS):
            break
        if length > _SHORT_RUN:
            # The client asks again for what is left.
            runs.append((_SHORT_RUN, bits))
            break
        runs.append((length, bits))
    return runs


def _allocation(image: Image, offset: int, length: int) -> Iterator[State]:
    for run in image.extents(offset, length):
        yield run.length, _ZERO | _HOLE if run.zero else 0


class DirtyRanges:
    """The states of a bitmap that nobody changes meanwhile. It is read when it is first asked for."""

    def __init__(self, driver: Bitmapped, name: str) -> None:
        self._driver, self._name = driver, name
        #: Where ranges begin and end, in turn, both ascending; None: not read yet.
        self._edges: array[int] | None = None

    def __call__(self, offset: int, length: int) -> Iterator[State]:
        """The states of ``[offset, offset + length)``."""
        edges = self._read()
        end = offset + length
        at = bisect_right(edges, offset)
        while offset < end:
            stop = min(edges[at], end) if at < len(edges) else end
            yield stop - offset, _DIRTY if at % 2 else 0
            offset, at = stop, at + 1

    def _read(self) -> array[int]:
        if self._edges is None:
            edges = array("Q")
            for start, length in self._driver.bitmap_ranges(self._name):
                edges.extend((start, start + length))
                if len(edges) > 2 * _MOST_RANGES:
                    raise MemoryError
            self._edges = edges
        return self._edges
