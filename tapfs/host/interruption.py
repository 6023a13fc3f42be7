"""The end of a command by a signal, for threads that wait for another process: they are told, and wait no longer.

A signal raises in the main thread alone, which then waits for its other threads. It is noted in this process's memory,
so that a fork that goes on serving does not see it.
"""

from __future__ import annotations

_noted: list[bool] = []


def interrupt() -> None:
    """Note that a signal ends the command. A signal handler may call it."""
    _noted.append(True)


def is_interrupted() -> bool:
    """Whether a signal ends the command."""
    return bool(_noted)


def forget() -> None:
    """Begin another command."""
    _noted.clear()
