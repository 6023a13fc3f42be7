"""Tries again, after a pause that doubles, of what failed by the network."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from tapfs.errors import ErrorKind, ImageError
from tapfs.host.remote.options import RemoteOptions

_Result = TypeVar("_Result")


def retried(attempt: Callable[[], _Result], options: RemoteOptions) -> _Result:
    """What `attempt` gives, once it succeeds. Raises its error where trying again is of no use, or was of none."""
    pause = options.pause_seconds
    for last in (*(False,) * (options.tries - 1), True):
        try:
            return attempt()
        except ImageError as error:
            if last or error.kind is not ErrorKind.IO:
                raise
        # Not all at the same moment, which might be what the server failed by.
        time.sleep(pause * random.uniform(0.5, 1))  # noqa: S311
        pause *= 2
    raise AssertionError("the last try neither succeeded nor failed")
