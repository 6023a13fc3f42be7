"""The pool: worker processes of this machine, each of which may hang, die or want too much memory without loss.

A task whose worker is lost is done again, alone, unless it was alone already: then the loss is its answer. So what one
image does costs no other image its answer, and is never blamed on another.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import NamedTuple, Self, cast

from tapfs.many.processes import start_process
from tapfs.many.tasks import MOST_MESSAGE_BYTES, Answer, Limits, Task, chunks, failure_data

_READ_BYTES = 1 << 20


class _Batch(NamedTuple):
    """The numbers of tasks that go to a worker in one message."""

    numbers: list[int]


class _Worker:
    """A worker process, the numbers of the tasks that it has, and what it has sent of an answer."""

    def __init__(self, handler: str, limits: Limits) -> None:
        self.process = start_process(handler, limits.memory_bytes or 0)
        self.numbers: deque[int] = deque()
        self.deadline = 0.0
        self._received = bytearray()

    def give(self, numbers: Sequence[int], tasks: Sequence[Task], timeout_seconds: float) -> None:
        """Send tasks. One that cannot take them is found dead later."""
        self.numbers.extend(numbers)
        self.deadline = time.monotonic() + timeout_seconds
        left = memoryview(json.dumps([tasks[number] for number in numbers]).encode() + b"\n")
        with contextlib.suppress(BrokenPipeError):
            while left:
                left = left[os.write(self.process.input, left) :]

    def received(self) -> list[Answer] | None:
        """The answers that have come whole; None if the worker has ended, or sends what is no answer."""
        piece = os.read(self.process.output, _READ_BYTES)
        self._received += piece
        if not piece or len(self._received) > MOST_MESSAGE_BYTES:
            return None
        found: list[Answer] = []
        while (end := self._received.find(b"\n")) >= 0:
            line = bytes(self._received[:end])
            del self._received[: end + 1]
            try:
                answers = json.loads(line)
            except ValueError:
                return None
            if not isinstance(answers, list):
                return None
            for answer in cast("list[object]", answers):
                if not isinstance(answer, dict) or not {"result", "error"} & cast("dict[str, object]", answer).keys():
                    return None
                found.append(cast("Answer", answer))
        return found if len(found) <= len(self.numbers) else None


class Pool:
    """Worker processes that do tasks: a `tapfs.many.tasks.Runner`, and a context at whose end they end."""

    def __init__(self, handler: str, limits: Limits, *, jobs: int) -> None:
        """`handler` names the module that does a task (`tasks.handler_named`). Workers start when they are needed."""
        self._handler = handler
        self._limits = limits
        self._jobs = max(1, jobs)
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.process.end()
        self._workers.clear()
        self._selector.close()

    def answers(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Answer]]:
        """See `tapfs.many.tasks.Runner.answers`."""
        together = max(1, min(self._limits.together, len(tasks) // (4 * self._jobs)))
        waiting = deque(_Batch(numbers) for numbers in chunks(range(len(tasks)), together))
        while waiting or any(worker.numbers for worker in self._workers):
            self._hand_out(waiting, tasks)
            now = time.monotonic()
            nearest = min(worker.deadline for worker in self._workers if worker.numbers)
            for key, _ in self._selector.select(max(0, nearest - now)):
                worker = cast("_Worker", key.data)
                answers = worker.received()
                if answers is None:
                    yield from self._lost(worker, waiting, timed_out=False)
                    continue
                worker.deadline = time.monotonic() + self._limits.timeout_seconds
                for answer in answers:
                    yield worker.numbers.popleft(), answer
            now = time.monotonic()
            for worker in [each for each in self._workers if each.numbers and each.deadline <= now]:
                yield from self._lost(worker, waiting, timed_out=True)

    def _hand_out(self, waiting: deque[_Batch], tasks: Sequence[Task]) -> None:
        for worker in self._workers:
            if waiting and not worker.numbers:
                worker.give(waiting.popleft().numbers, tasks, self._limits.timeout_seconds)
        while waiting and len(self._workers) < self._jobs:
            worker = _Worker(self._handler, self._limits)
            self._workers.append(worker)
            self._selector.register(worker.process.output, selectors.EVENT_READ, worker)
            worker.give(waiting.popleft().numbers, tasks, self._limits.timeout_seconds)

    def _lost(self, worker: _Worker, waiting: deque[_Batch], *, timed_out: bool) -> Iterator[tuple[int, Answer]]:
        """Go on without a worker: its tasks are done again one by one, or the loss is the answer of its only one."""
        self._selector.unregister(worker.process.output)
        self._workers.remove(worker)
        numbers = list(worker.numbers)
        code = worker.process.end()
        if len(numbers) == 1:
            yield numbers[0], {"error": _loss(code, self._limits.timeout_seconds if timed_out else None)}
            return
        waiting.extendleft(_Batch([number]) for number in reversed(numbers))


def _loss(code: int | None, timeout_seconds: float | None) -> dict[str, object]:
    if timeout_seconds is not None:
        message = f"was not done after {timeout_seconds:g} seconds, and was given up"
        return failure_data("timeout", message, "give it longer with --timeout")
    how = f"with code {code}"
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            how = f"by {signal.Signals(-code).name}"
    return failure_data("worker_lost", f"the process that looked at it ended {how}", "please report it")
