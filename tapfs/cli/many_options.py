"""The options of commands that work on many images: how many at a time, and what one may take."""

from __future__ import annotations

import argparse
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tapfs.cli.parser import UsageError, size_argument

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from tapfs.many.tasks import Runner

    #: How an option is added to a group of options.
    Add = Callable[..., argparse.Action]

#: The most memory of a worker process where nobody says it.
_MEMORY_BYTES = 2 << 30


def add_many_options(add: Add, *, timeout: str) -> None:
    """Add --jobs, --timeout, --memory and --scheduler; `timeout` says how long an image may take if nobody says it."""
    add("--jobs", metavar="N", type=int, help="worker processes at a time (one for each processor if not given)")
    add(
        "--timeout",
        metavar="SECONDS",
        type=float,
        help=f"give up an image after so many seconds ({timeout} if not given)",
    )
    add(
        "--memory",
        metavar="SIZE",
        type=size_argument,
        help="the most memory of a worker process (2G if not given; 0: no bound)",
    )
    add(
        "--scheduler",
        metavar="ADDRESS",
        help="have the workers of the Dask scheduler at ADDRESS do it: tcp://HOST:8786; docs/cluster.md",
    )


@contextmanager
def runner_of(
    arguments: argparse.Namespace, handler: str, *, timeout_seconds: float, together: int, program: str
) -> Generator[Runner]:
    """What does the tasks, as the options ask; `timeout_seconds` is used where nobody says another."""
    from tapfs.many.tasks import Limits

    if arguments.jobs is not None and arguments.jobs < 1:
        raise UsageError("--jobs needs a number from 1 on", program)
    timeout = timeout_seconds if arguments.timeout is None else arguments.timeout
    if not timeout > 0:
        raise UsageError("--timeout needs seconds above 0", program)
    memory = _MEMORY_BYTES if arguments.memory is None else arguments.memory
    limits = Limits(timeout, memory or None, together)
    if arguments.scheduler is not None:
        if arguments.jobs is not None:
            raise UsageError("--jobs is of this machine: the workers of the --scheduler say how many they do", program)
        from tapfs.many.cluster import Cluster

        with Cluster(arguments.scheduler, handler, limits) as cluster:
            yield cluster
        return
    from tapfs.many.pool import Pool

    with Pool(handler, limits, jobs=arguments.jobs or len(os.sched_getaffinity(0))) as pool:
        yield pool
