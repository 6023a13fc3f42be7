"""A guard of the suite: no test may close a descriptor that a live socket of Python has.

Whoever closes a descriptor twice closes what has taken its number meanwhile. The harm shows much later, in another
test whose connection breaks. After each test the guard asks the kernel what each live socket's descriptor is.
"""

from __future__ import annotations

import socket
import traceback
import weakref
from typing import Any

_DEPTH = 8

_live: weakref.WeakKeyDictionary[socket.socket, traceback.StackSummary] = weakref.WeakKeyDictionary()
_initialise = socket.socket.__init__


def watch() -> None:
    """Note each socket that is made from now on."""

    def initialise(self: socket.socket, *arguments: Any, **named: Any) -> None:
        _initialise(self, *arguments, **named)
        frames = traceback.walk_stack(None)
        _live[self] = traceback.StackSummary.extract(frames, limit=_DEPTH, lookup_lines=False)

    socket.socket.__init__ = initialise  # type: ignore[method-assign]


def lost_descriptors() -> list[str]:
    """What is wrong with sockets that still live, each told once: what it is, and where it was made."""
    found: list[str] = []
    for each in tuple(_live):
        if (wrong := _wrong(each)) is not None:
            made = "".join(reversed(_live.pop(each).format()))
            found.append(f"{wrong}; somebody else has closed its descriptor. It was made here:\n{made}")
    return found


def _wrong(each: socket.socket) -> str | None:
    number = each.fileno()
    if number < 0:
        return None
    try:
        family = each.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN)
    except OSError as error:
        return None if each.fileno() < 0 else f"the socket of descriptor {number} cannot be used: {error.strerror}"
    if family == each.family:
        return None
    return f"descriptor {number} is a socket of family {family}, and its object one of {each.family}"
