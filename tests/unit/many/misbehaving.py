"""A handler of tasks that do what a hostile image might make of a worker process."""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from typing import cast

from tapfs.errors import ErrorKind, ImageError
from tapfs.many.tasks import Task


def answer(task: Task) -> object:
    """Do what the task says; a plain one is its own answer."""
    match task["do"]:
        case "hang":
            time.sleep(3600)
        case "die":
            faulthandler.disable()  # pytest's would tell of it on the suite's output
            os.kill(os.getpid(), signal.SIGSEGV)
        case "eat":
            return len(bytearray(cast("int", task["bytes"])))
        case "raise":
            raise ImageError(ErrorKind.CORRUPT, "is bad", path="x", offset=7, op="read")
        case "bug":
            raise ZeroDivisionError("oh")
        case "chatter":
            os.write(1, b"not json\n")
    return os.getpid() if task["do"] == "pid" else task["do"]
