"""The end of a command by a signal, for threads that wait for another process: they are told, and wait no longer.

A signal raises in the main thread alone, which then waits for its other threads. The signal is noted in this process's
memory, so that a fork that goes on serving does not see it.
"""

from __future__ import annotations

from tapfs.errors import ErrorKind, ImageError

_noted: list[int] = []


class EndedBySignalError(ImageError):
    """What a thread waited for had not come when a signal ended the command."""

    signal_number = 0


def interrupt(signal_number: int) -> None:
    """Note that a signal ends the command. A signal handler may call it."""
    _noted.append(signal_number)


def forget() -> None:
    """Begin another command."""
    _noted.clear()


def refuse_to_wait(path: str | None, op: str) -> None:
    """Raise EndedBySignalError if a signal ends the command."""
    if _noted:
        message = "a signal has ended the command before this had come"
        error = EndedBySignalError(ErrorKind.IO, message, path=path, op=op, remedy="run it again")
        error.signal_number = _noted[0]
        raise error
