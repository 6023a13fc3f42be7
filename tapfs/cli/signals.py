"""The signals that end a command, and a way to hold them back while the command cannot be interrupted yet.

An exception from a signal handler can come out of any line, also of code that turns it into another error:
an import in the middle, a class that is being made. So these signals wait until such code has run.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import cast

from tapfs.host.interruption import EndedBySignalError
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
    found = (each for each in _made_of(error) if isinstance(each, KeyboardInterrupt | Terminated))
    return next(found, None)


def wait_ended_in(error: BaseException) -> KeyboardInterrupt | Terminated | None:
    """The interruption behind an error that was made of a thread's wait, if a signal has ended that."""
    for each in _made_of(error):
        if isinstance(each, EndedBySignalError):
            return KeyboardInterrupt() if each.signal_number == signal.SIGINT else Terminated(each.signal_number)
    return None


def _made_of(error: BaseException) -> Iterator[BaseException]:
    """An error and all that it was made of."""
    seen: set[int] = set()
    ahead: list[BaseException | None] = [error]
    while ahead:
        found = ahead.pop()
        if found is not None and id(found) not in seen:
            yield found
            seen.add(id(found))
            ahead += [found.__cause__, found.__context__]
            if isinstance(found, BaseExceptionGroup):
                ahead += cast("BaseExceptionGroup[BaseException]", found).exceptions
