"""Slow down a guest that connects and closes in a loop: each of its steps costs domain 0 time and a line of log.

A guest that starts, stops, or goes through kexec takes a few steps at once, then none for long. So steps are saved up:
a burst is free, and only who goes on without an end waits.
"""

from __future__ import annotations

#: Steps that are answered at once, and how many are saved up in a second.
BURST = 60
PER_SECOND = 2.0


class StepRate:
    """The steps of one device. Times are in seconds, of any clock that only goes forward."""

    def __init__(self) -> None:
        self._saved = float(BURST)
        self._counted_at: float | None = None

    def after_step(self, now: float) -> float:
        """Count a step; the seconds to wait before the next one."""
        if self._counted_at is not None:
            self._saved = min(float(BURST), self._saved + (now - self._counted_at) * PER_SECOND)
        self._counted_at = now
        self._saved -= 1
        return max(0.0, -self._saved / PER_SECOND)
