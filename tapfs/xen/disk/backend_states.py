"""The protocol of xenbus as a table: from the two states of a device follows the next step of its backend.

Each decision follows from the states as they are now, never from events. An event may come several times, or late, or
about a state that has changed again meanwhile.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import NamedTuple

from tapfs.xen.device import State


class Seen(NamedTuple):
    """The states in xenstore. `online`: the toolstack wants the device to stay, whatever the guest does."""

    backend: State
    frontend: State
    online: bool


class Step(Enum):
    """What is to be done."""

    NOTHING = auto()
    #: Connect to the frontend's rings, then state 4 (unless we are at 5: then serve until the frontend has closed).
    CONNECT = auto()
    #: Let go of the rings if we have them, then state 2: a frontend may begin anew.
    AWAIT_FRONTEND = auto()
    #: State 5, the rings still served: the frontend is about to close.
    CLOSING = auto()
    #: Let go of the rings and flush, then state 6.
    CLOSE = auto()
    #: The same, and the image is closed before: the device is done.
    CLOSE_FOR_GOOD = auto()
    #: State 2 after a moment: who closed may want to see state 6 before it begins anew (kexec does).
    AWAIT_FRONTEND_SOON = auto()


_RUNNING = (State.INITIALISED, State.CONNECTED)
_NOT_STARTED = (State.INITIALISING, State.INIT_WAIT)
#: Nothing of a disk is ever reconfigured this way.
_MEANINGLESS = (State.RECONFIGURING, State.RECONFIGURED)


class Ours(NamedTuple):
    """How we stand.

    `connected`: we have the frontend's rings. `left`: a predecessor had them, and we have not looked at them yet.
    `paused`: no rings may be taken up. `closed`: the image is closed for good.
    """

    connected: bool = False
    left: bool = False
    paused: bool = False
    closed: bool = False


def next_step(seen: Seen, ours: Ours) -> Step:
    """The step for these states."""
    if ours.closed and seen.backend is not State.UNKNOWN:
        # This process serves nothing any more. If the disk is wanted again the supervisor starts another process.
        return Step.CLOSE_FOR_GOOD
    if seen.frontend in _MEANINGLESS:
        return Step.NOTHING
    match seen.backend:
        case State.CLOSED:
            return _closed(seen, ours)
        case State.CLOSING:
            return _closing(seen, ours)
        case State.INITIALISING | State.INIT_WAIT | State.INITIALISED | State.CONNECTED:
            return _open(seen, ours)
        case _:
            return Step.NOTHING


def _open(seen: Seen, ours: Ours) -> Step:
    in_use = ours.connected or ours.left or seen.backend is State.CONNECTED
    may_connect = not (ours.connected or ours.paused)
    if seen.frontend in _RUNNING:
        return Step.CONNECT if may_connect else Step.NOTHING
    if seen.frontend is State.CLOSING:
        # It may still have requests in the rings that our predecessor has left.
        return Step.CONNECT if ours.left and may_connect else Step.CLOSING
    if seen.frontend in _NOT_STARTED and seen.online:
        return Step.AWAIT_FRONTEND if in_use or seen.backend is not State.INIT_WAIT else Step.NOTHING
    if not seen.online:
        return Step.CLOSE_FOR_GOOD  # also where state 5 was asked for while we went to state 2
    return Step.CLOSE if in_use else Step.NOTHING


def _closing(seen: Seen, ours: Ours) -> Step:
    if seen.frontend in (*_RUNNING, State.CLOSING):
        # A frontend that we have refused is not taken up again before it has closed.
        return Step.CONNECT if ours.left and not (ours.connected or ours.paused) else Step.NOTHING
    if not seen.online:
        return Step.CLOSE_FOR_GOOD
    return Step.AWAIT_FRONTEND if seen.frontend in _NOT_STARTED else Step.CLOSE


def _closed(seen: Seen, ours: Ours) -> Step:
    if not seen.online:
        return Step.CLOSE_FOR_GOOD
    if seen.frontend in _NOT_STARTED:
        return Step.AWAIT_FRONTEND
    if ours.connected:
        return Step.CLOSE
    if seen.frontend is State.CLOSED:
        return Step.AWAIT_FRONTEND_SOON
    # It has been through 1 while we looked elsewhere.
    return Step.CONNECT if seen.frontend is State.INITIALISED and not ours.paused else Step.NOTHING
