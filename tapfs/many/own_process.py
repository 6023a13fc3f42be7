"""A process of its own for one task: it gives up its rights for that task, and the process that has made it keeps them.

The one that made it parses no image. What comes back is JSON, and is looked at: the process may be a stranger's by now.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable
from typing import NoReturn, cast

from tapfs.errors import from_os_error
from tapfs.host.sandbox import calls
from tapfs.many.tasks import MOST_MESSAGE_BYTES, Failed, error_data, failure_data

_PIECE_BYTES = 1 << 20

#: The keys of an error as data, and the types that their values have.
_TEXT, _TEXT_OR_NONE, _NUMBER_OR_NONE = (str,), (str, type(None)), (int, type(None))
_ERROR: dict[str, tuple[type, ...]] = {
    "kind": _TEXT,
    "message": _TEXT,
    "path": _TEXT_OR_NONE,
    "offset": _NUMBER_OR_NONE,
    "operation": _TEXT_OR_NONE,
    "remedy": _TEXT_OR_NONE,
}


def done_alone(do: Callable[[], object]) -> object:
    """What `do` gives, a value of JSON, in a process of its own. Be the only thread.

    Raises Failed with what `do` raised, or with the loss of the process; ImageError where there can be none.
    """
    ours, theirs = os.pipe()
    parent = os.getpid()
    try:
        child = os.fork()
    except OSError as error:
        os.close(ours)
        os.close(theirs)
        raise from_os_error(error, path=None, op="start a process for the image") from error
    if child == 0:
        os.close(ours)
        _do(do, theirs, parent)
    os.close(theirs)
    said: bytes | None = None
    try:
        said = _all_of(ours)
    finally:
        os.close(ours)
        if said is None:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    answer = None if said is None else _answer_in(said)
    if answer is None:
        raise Failed(_loss(os.waitstatus_to_exitcode(status)))
    if "error" in answer:
        raise Failed(cast("dict[str, object]", answer["error"]))
    return answer["result"]


def _do(do: Callable[[], object], output: int, parent: int) -> NoReturn:
    code = 1
    try:
        calls.end_with_parent()
        if os.getppid() == parent:
            try:
                answer = {"result": do()}
            except Exception as error:  # noqa: BLE001  it is told
                answer = {"error": error_data(error)}
            left = memoryview(json.dumps(answer).encode())
            while left:
                left = left[os.write(output, left) :]
            code = 0
    finally:
        os._exit(code)


def _all_of(descriptor: int) -> bytes | None:
    """What comes until the end; None where that is more than any honest answer."""
    found = bytearray()
    while piece := os.read(descriptor, _PIECE_BYTES):
        found += piece
        if len(found) > MOST_MESSAGE_BYTES:
            return None
    return bytes(found)


def _answer_in(said: bytes) -> dict[str, object] | None:
    """The answer if it is one: a result, or an error with its keys."""
    with contextlib.suppress(ValueError, RecursionError):
        answer = json.loads(said)
        if isinstance(answer, dict):
            found = cast("dict[str, object]", answer)
            error = found.get("error")
            if "result" in found or (isinstance(error, dict) and _is_error(cast("dict[str, object]", error))):
                return found
    return None


def _is_error(error: dict[str, object]) -> bool:
    return error.keys() == _ERROR.keys() and all(isinstance(error[key], kinds) for key, kinds in _ERROR.items())


def _loss(code: int) -> dict[str, object]:
    how = f"with code {code}"
    if code < 0:
        with contextlib.suppress(ValueError):
            how = f"by {signal.Signals(-code).name}"
    return failure_data("worker_lost", f"the process that looked at it ended {how}", "please report it")
