"""The claims of writers on ranges of a disk, and the last commits: they say who must look at the map again.

A writer that wants places for ranges claims them until its commit. A writer whose ranges overlap a claim waits until
the claim is gone, and maps its ranges afresh. So does a writer that saw the map before an overlapping commit: a granule
that was unallocated then may be another writer's by now.

The map lock of the layer is held around every call. A writer that waits gives the lock up meanwhile.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

from tapfs.driver import Reservation
from tapfs.extent import Range

#: So many commits are remembered. A writer that has missed more must look at the map again, whatever their ranges.
_RECENT_COMMITS = 64


class Claim:
    """Ranges that one writer changes, and what the driver has reserved for them, if anything is open there."""

    __slots__ = ("ranges", "reservation")

    def __init__(self) -> None:
        self.ranges: Sequence[Range] = ()
        self.reservation: Reservation | None = None


class Claims:
    """The claims and the last commits of one layer. The ranges of each ascend and do not overlap."""

    def __init__(self, map_lock: threading.Lock) -> None:
        self._changed = threading.Condition(map_lock)
        self._held: list[Claim] = []
        #: The number of commits so far. It may be read without the lock.
        self.commits = 0
        self._recent: deque[Sequence[Range]] = deque(maxlen=_RECENT_COMMITS)

    def wait_until_free(self, ranges: Sequence[Range]) -> bool:
        """Wait until nobody has claimed any of the ranges; whether that took waiting."""
        waited = False
        while any(overlap(held.ranges, ranges) for held in self._held):
            waited = True
            self._changed.wait()
        return waited

    def hold(self, claim: Claim) -> None:
        """Hold the claim's ranges, which are free, until `let_go`."""
        self._held.append(claim)

    def let_go(self, claim: Claim) -> None:
        """Give the ranges back, if they are held."""
        if claim in self._held:
            self._held.remove(claim)
            self._changed.notify_all()

    def committed(self, ranges: Sequence[Range]) -> None:
        """Note a commit that has changed the map of the ranges, and that everybody sees."""
        self._recent.append(ranges)
        self.commits += 1

    def changed_since(self, commits_seen: int, ranges: Sequence[Range]) -> bool:
        """Whether a commit after the first `commits_seen` may have changed the map of one of the ranges."""
        newer = self.commits - commits_seen
        if newer > len(self._recent):
            return True
        return any(overlap(self._recent[-each], ranges) for each in range(1, newer + 1))


def overlap(left: Sequence[Range], right: Sequence[Range]) -> bool:
    """Whether any range of one list overlaps any of the other; the ranges of each ascend and do not overlap."""
    if not left or not right or left[-1].end <= right[0].offset or right[-1].end <= left[0].offset:
        return False
    others = iter(right)
    other = next(others)
    for offset, length in left:
        while other.offset + other.length <= offset:
            following = next(others, None)
            if following is None:
                return False
            other = following
        if other.offset < offset + length:
            return True
    return False
