"""A bound on the processor time that a block may take: a hostile image may hold nobody."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def bounded(seconds: float, error: Callable[[FrameType | None], Exception]) -> Generator[None]:
    """Raise the error, made of where the block is, once the block has taken so much. For the main thread only."""

    def end(_signal: int, frame: FrameType | None) -> None:
        raise error(frame)

    before = signal.signal(signal.SIGPROF, end)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
