"""The signals that end a process, and a way to hold them back until the process can obey them."""

from __future__ import annotations

import signal
from collections.abc import Generator
from contextlib import contextmanager

#: Ctrl-C, kill(1) and a closed terminal.
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


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
