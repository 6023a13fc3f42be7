"""The signals that end a process, and a way to hold them back until the process can obey them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

#: Ctrl-C, kill(1) and a closed terminal.
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def handle_ending(handler: Callable[[int, FrameType | None], None]) -> None:
    """Have a handler for the ending signals. One that the process was started to ignore stays ignored."""
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def do_nothing(_number: int, _frame: FrameType | None) -> None:
    """The handler while no service obeys the signal: everything is done by then, or it is held back."""


@contextmanager
def signals_held() -> Generator[None]:
    """The ending signals wait until the block has ended.

    A thread or a process that is started in the block holds them back from its start on.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
