"""Restarts: decide whether and when a crashed disk process is started again."""

from __future__ import annotations

from tapfs.records import dataclass, field


@dataclass(slots=True)
class Restarts:
    """The crashes of one device; times are in seconds of any one clock that does not go back."""

    most: int = 5
    within: float = 60.0
    first_pause: float = 1.0
    _crashes: list[float] = field(default_factory=list[float])

    def after_crash(self, now: float) -> float | None:
        """How long to wait before the next start; None: it is no use any more.

        The first start comes at once: the guest waits for it.
        """
        self._crashes = [crash for crash in self._crashes if now - crash < self.within] + [now]
        recent = len(self._crashes)
        if recent >= self.most:
            return None
        return 0.0 if recent == 1 else self.first_pause * 2 ** (recent - 2)
