"""Run what blocks in one of trio's threads, or in the calling thread where the host refuses a thread."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any, TypeVar

import trio

_Result = TypeVar("_Result")

#: The name in trio of the choice of not waiting for a thread's end: Debian 12 has 0.22, which has the older name alone.
_ABANDONING = (
    "abandon_on_cancel" if "abandon_on_cancel" in signature(trio.to_thread.run_sync).parameters else "cancellable"
)


async def in_thread_alone(work: Callable[[], _Result]) -> _Result:
    """The result of `work`, which may wait for the event loop; who is cancelled does not wait for its end.

    Raises RuntimeError or MemoryError where the host refuses a thread.
    """
    choice: dict[str, Any] = {_ABANDONING: True}
    return await trio.to_thread.run_sync(work, **choice)


async def in_thread(
    work: Callable[[], _Result], *, limiter: trio.CapacityLimiter | None = None, abandoned: bool = False
) -> _Result:
    """The result of `work`, or what it raised. `abandoned`: who is cancelled does not wait for its end.

    A process at its limit of threads serves slowly then, but rightly: everything else in the event loop waits for the
    work. So `work` must not wait for the event loop itself.
    """
    begun = False
    choice: dict[str, Any] = {_ABANDONING: abandoned}

    def begin() -> _Result:
        nonlocal begun
        begun = True
        return work()

    try:
        return await trio.to_thread.run_sync(begin, limiter=limiter, **choice)
    except (RuntimeError, MemoryError):
        if begun:
            raise
    return work()
