"""The cluster: the workers of a Dask scheduler do the tasks, each in a worker process of its own (`tapfs.many.pool`).

A task of Dask is a batch of tasks of ours. What a batch costs the scheduler is the same for one image and for a
thousand, so a batch is as large as fits into a second. A batch whose worker is lost is done again by another: its
results come once, and an image that was made already is replaced by an equal one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from importlib import import_module
from types import TracebackType
from typing import Any, NamedTuple, Self, cast

from tapfs.errors import ErrorKind, ImageError
from tapfs.many.tasks import Answer, Limits, Task, failure_data

#: A batch is to take so many seconds, and has at most so many images.
BATCH_SECONDS = 1.0
MOST_IMAGES = 3000

#: Batches that wait at each worker's thread, so that none is idle while an answer is on its way.
_AHEAD = 2

_CONNECT_SECONDS, _WORKERS_SECONDS = 10, 30


class Done(NamedTuple):
    """The answers of a batch in its order, and the seconds that it took."""

    answers: list[Answer]
    seconds: float


def run_tasks(version: str, handler: str, limits: Limits, tasks: Sequence[Task]) -> Done:
    """Do a batch: the function that a worker of the cluster runs. Raises RuntimeError for another version of tapfs."""
    from tapfs.many.pool import Pool

    if (own := _version()) != version:
        raise RuntimeError(f"the worker has tapfs {own}, the command is {version}")
    started = time.monotonic()
    pools: dict[object, Pool] = _here.__dict__.setdefault("pools", {})
    kind = handler, limits, tasks[0].get("sandboxed")  # a process that has given up rights does not get them back
    pool = pools.get(kind)
    if pool is None:
        pool = pools[kind] = Pool(handler, limits, jobs=1)
    found = dict(pool.answers(tasks))
    return Done([found[number] for number in range(len(tasks))], time.monotonic() - started)


#: The pools of each thread of a worker: their processes go on from batch to batch.
_here = threading.local()


def _version() -> str:
    """The version of tapfs here."""
    from importlib.metadata import version

    return version("tapfs")


class Batches:
    """The sizes of batches, by what the ones before have cost."""

    def __init__(self, threads: int) -> None:
        self._threads = max(1, threads)
        self._seconds = 0.0
        self._images = 0

    def note(self, images: int, seconds: float) -> None:
        """A batch of so many images took so long."""
        self._images += images
        self._seconds += seconds

    def size(self, left: int) -> int:
        """Images in the next batch while so many are left: few for each thread at the end, one before all is known."""
        if not self._images:
            return 1
        fitting = int(BATCH_SECONDS * self._images / max(self._seconds, 1e-9))
        return max(1, min(fitting, MOST_IMAGES, left // (_AHEAD * self._threads)))


class Cluster:
    """A connection to a scheduler: a `tapfs.many.tasks.Runner`, and a context at whose end it ends."""

    def __init__(self, address: str, handler: str, limits: Limits) -> None:
        """Connect, and wait for a first worker. Raises ImageError."""
        self._address = address
        self._handler = handler
        self._limits = limits
        try:
            self._distributed: Any = import_module("distributed")
        except ImportError as error:
            raise ImageError(
                ErrorKind.UNSUPPORTED,
                "--scheduler needs the Python package distributed",
                op="connect to the scheduler",
                remedy="install it here and on every worker: pip install 'tapfs[cluster]'",
            ) from error
        for name in ("distributed", "tornado", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # what it says of lost workers is no news
        try:
            self._client = self._distributed.Client(address, timeout=_CONNECT_SECONDS, set_as_default=False)
        except (OSError, ValueError, TimeoutError) as error:
            raise self._failed(f"does not answer: {error}", "is it running there?") from error
        try:
            self._client.wait_for_workers(1, timeout=_WORKERS_SECONDS)
        except TimeoutError as error:
            self._client.close()
            raise self._failed("has no workers", "start some: dask worker ADDRESS --nthreads 1") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def answers(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Answer]]:
        """See `tapfs.many.tasks.Runner.answers`."""
        waiting = deque(range(len(tasks)))
        alone: deque[int] = deque()
        under_way: dict[Any, list[int]] = {}
        threads = sum(cast("dict[str, int]", self._client.nthreads()).values())
        batches = Batches(threads)
        completed = self._distributed.as_completed([], loop=self._client.loop, raise_errors=False)
        while waiting or alone or under_way:
            while (waiting or alone) and len(under_way) < _AHEAD * max(1, threads):
                source, size = (alone, 1) if alone else (waiting, batches.size(len(waiting)))
                numbers = [source.popleft() for _ in range(size)]
                future = self._submit([tasks[number] for number in numbers])
                under_way[future] = numbers
                completed.add(future)
            future = next(completed)
            numbers = under_way.pop(future)
            done = self._done(future, numbers)
            if done is None:
                alone.extend(numbers)
                continue
            batches.note(len(numbers), done.seconds)
            yield from zip(numbers, done.answers, strict=True)

    def _submit(self, tasks: list[Task]) -> Any:
        words = (_version(), self._handler, self._limits, tasks)
        return self._client.submit(run_tasks, *words, pure=False, retries=0)

    def _done(self, future: Any, numbers: Sequence[int]) -> Done | None:
        """What a batch has given; None if its images are to be done one by one. Raises ImageError."""
        if future.status == "finished":
            return cast("Done", future.result())
        error = future.exception() if future.status == "error" else None
        if isinstance(error, self._distributed.scheduler.KilledWorker):
            if len(numbers) > 1:
                return None
            message = "each worker of the cluster that looked at it was lost"
            return Done([{"error": failure_data("worker_lost", message, "look at the logs of the workers")}], 0.0)
        if error is None:
            raise self._failed("was lost", "start it, and say the command again: what is done is not done again")
        raise self._failed(f"has a worker that failed: {error}", "have the same version on every worker") from error

    def _failed(self, what: str, remedy: str) -> ImageError:
        message = f"the scheduler {self._address} {what}"
        return ImageError(ErrorKind.IO, message, op="use the cluster", remedy=remedy)
