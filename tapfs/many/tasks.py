"""Tasks and their answers: what passes between who has many images to look at and the processes that do it.

Both are JSON objects, so a worker process that a hostile image has taken over can send wrong facts and nothing worse.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, cast

from tapfs.errors import ImageError

#: A task, and what came of it: the handler's result under "result", or an error (`error_data`) under "error".
Task = Mapping[str, object]
Answer = Mapping[str, object]

#: The longest message between two processes, in bytes: more than any honest answer has.
MOST_MESSAGE_BYTES = 256 << 20


class Limits(NamedTuple):
    """What one task may take, and how many go to a process in one message.

    `memory_bytes` is what the process may have of its own (None: no bound).
    """

    timeout_seconds: float = 60
    memory_bytes: int | None = None
    together: int = 1


class Failed(Exception):  # noqa: N818  a task has failed, and that is its answer
    """A task that another process has done has failed: `data` is the error as data."""

    def __init__(self, data: dict[str, object]) -> None:
        super().__init__(data["message"])
        self.data = data


class Runner(Protocol):
    """Something that does tasks: processes of this machine, or a cluster."""

    def answers(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Answer]]:
        """Each task's number and answer once, in the order in which they come."""
        ...


def error_data(error: BaseException) -> dict[str, object]:
    """An error as data: of an ImageError all that it says."""
    if isinstance(error, Failed):
        return error.data
    if isinstance(error, ImageError):
        return {
            "kind": str(error.kind),
            "message": error.message,
            "path": error.path,
            "offset": error.offset,
            "operation": error.op,
            "remedy": error.remedy,
        }
    if isinstance(error, MemoryError):
        return failure_data("no_memory", "needs more memory than one image may take here", "say more with --memory")
    return failure_data("bug", f"{type(error).__name__}: {error}", "please report it")


def failure_data(kind: str, message: str, remedy: str | None = None) -> dict[str, object]:
    """An error that is no ImageError, as data of the same keys."""
    return {"kind": kind, "message": message, "path": None, "offset": None, "operation": None, "remedy": remedy}


def handler_named(module: str) -> Callable[[Task], object]:
    """The function `answer` of a module, which does one task."""
    return cast("Callable[[Task], object]", importlib.import_module(module).answer)


def answer_of(handler: Callable[[Task], object], task: Task) -> Answer:
    """What comes of a task: whatever is raised by it is its answer."""
    try:
        return {"result": handler(task)}
    except Exception as error:  # noqa: BLE001  one image must not end the work on the others
        return {"error": error_data(error)}


def chunks(numbers: Iterable[int], size: int) -> list[list[int]]:
    """Numbers in lists of at most `size`."""
    found: list[list[int]] = []
    for number in numbers:
        if not found or len(found[-1]) >= size:
            found.append([])
        found[-1].append(number)
    return found
