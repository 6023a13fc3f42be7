"""The worker process: it takes lists of tasks as JSON lines on standard input, and answers each in its order.

It ends with the process that started it, however that one ends. `python -m tapfs.many.worker HANDLER MEMORY PARENT`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import resource
import signal
import sys
import time
import warnings

from tapfs.many.tasks import Answer, answer_of, handler_named

#: Answers are kept back for so long, so that a small one costs no message of its own.
_KEPT_SECONDS = 0.02

#: Objects between two searches for garbage: an open image has a thousand, and leaves a few.
_GARBAGE_OBJECTS = 50_000

#: prctl: the signal that a process gets when its parent ends.
_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Serve tasks until standard input ends."""
    module, memory, parent = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    output = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no answer
    return serve(module, memory, parent, 0, output)


def serve(module: str, memory_bytes: int, parent: int, source: int, output: int) -> int:
    """Do the tasks that come from the descriptor `source`, and answer at `output`, until it ends or `parent` does."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return 1
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it decides
    warnings.simplefilter("ignore")
    handler = handler_named(module)
    if memory_bytes:
        with contextlib.suppress(ValueError, OSError):  # there is a lower limit already
            resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    gc.freeze()
    gc.set_threshold(_GARBAGE_OBJECTS)
    for line in os.fdopen(source, "rb"):
        ready: list[Answer] = []
        last = time.monotonic()
        for task in json.loads(line):
            if ready and time.monotonic() - last > _KEPT_SECONDS:
                _send(output, ready)
                ready, last = [], time.monotonic()
            ready.append(answer_of(handler, task))
        _send(output, ready)
    return 0


def _send(output: int, answers: list[Answer]) -> None:
    left = memoryview(json.dumps(answers, separators=(",", ":")).encode() + b"\n")
    while left:
        left = left[os.write(output, left) :]


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
