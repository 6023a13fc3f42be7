"""A word on stderr after a moment of silence: what a command waits for, and how to go on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager

from tapfs.cli.guard import complain

#: Seconds before something is said.
_SILENT_SECONDS = 2.0


@contextmanager
def told_of_waiting(what: Callable[[], str | None]) -> Generator[None]:
    """Say what is waited for, as `what` knows it then, if the context takes long. No thread is left at its end."""
    timer = threading.Timer(_SILENT_SECONDS, lambda: _say(what()))
    timer.daemon = True
    try:
        timer.start()
    except RuntimeError:  # no thread can be started: the command does without the words
        yield
        return
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def _say(text: str | None) -> None:
    if text is not None:
        complain("tapfs", text)
