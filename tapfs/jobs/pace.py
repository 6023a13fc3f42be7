"""A pace: it holds a copy down to so many bytes a second."""

from __future__ import annotations

import time
from collections.abc import Callable

#: A copy that was held up by something else catches up at most so many seconds.
_CATCH_UP_SECONDS = 1.0


class Pace:
    """At most `rate` bytes a second, on the average; None or 0: as fast as it goes."""

    def __init__(
        self,
        rate: int | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._rate = rate or None
        self._clock = clock
        self._sleep = sleep
        #: The moment at which all that was moved was due.
        self._due = clock()

    def moved(self, count: int) -> None:
        """So many bytes were moved: wait until that was due."""
        if self._rate is None or not count:
            return
        now = self._clock()
        self._due = max(self._due, now - _CATCH_UP_SECONDS) + count / self._rate
        if self._due > now:
            self._sleep(self._due - now)
