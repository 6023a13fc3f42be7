"""The signals that end a command, and a way to hold them back while the command cannot be interrupted yet.

An exception from a signal handler can come out of any line, also of code that turns it into another error:
an import in the middle, a class that is being made. So these signals wait until such code has run.
"""

from __future__ import annotations

import signal
from typing import cast

from tapfs.serving.signals import ENDING


class Terminated(BaseException):
    """SIGTERM or SIGHUP: unwinds the command so that it cleans up."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


def release_signals() -> None:
    """End what `tapfs.cli.entry` began: from now on the ending signals come through."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)


def interruption_in(error: BaseException) -> KeyboardInterrupt | Terminated | None:
    """The interruption that an error was made of, if it was: what others made of our exception."""
    seen: set[int] = set()
    ahead: list[BaseException | None] = [error]
    while ahead:
        found = ahead.pop()
        if isinstance(found, KeyboardInterrupt | Terminated):
            return found
        if found is not None and id(found) not in seen:
            seen.add(id(found))
            ahead += [found.__cause__, found.__context__]
            if isinstance(found, BaseExceptionGroup):
                ahead += cast("BaseExceptionGroup[BaseException]", found).exceptions
    return None
