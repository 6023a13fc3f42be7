"""The tasks of a batch, as a worker process does them: a command of tapfs by its words.

Each command is in a process of its own, which enters the sandbox that the command has alone.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from functools import partial
from typing import cast

from tapfs.cli.main import run_command
from tapfs.cli.parser import UsageError
from tapfs.errors import ErrorKind, ImageError, options_as
from tapfs.many.own_process import done_alone
from tapfs.many.tasks import Failed, Task, failure_data


def answer(task: Task) -> object:
    """Run the command; its exit code, what it says on standard error, and the JSON that it prints, if it prints any.

    The task has `command`, `words`, and the `folder` that relative names start at. Raises ImageError, Failed.
    """
    found = done_alone(partial(_run, task))
    done = cast("dict[str, object]", found if isinstance(found, dict) else {})
    code, said = done.get("exit_code"), done.get("said")
    if not isinstance(code, int) or not isinstance(said, list):
        raise Failed(failure_data("worker_lost", "the process that looked at it gave no answer", "please report it"))
    return {"exit_code": code, "said": [str(line) for line in cast("list[object]", said)], "report": done.get("report")}


def _run(task: Task) -> object:
    folder = cast("str", task["folder"])
    if os.getcwd() != folder:
        os.chdir(folder)
    printed, said = io.StringIO(), io.StringIO()
    with options_as("command_line"), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
        try:
            code = run_command(cast("str", task["command"]), cast("list[str]", task["words"]), owned=True)
        except UsageError as error:
            raise ImageError(ErrorKind.INVALID_ARGUMENT, str(error), op="read the command line") from error
    report: object = None
    with contextlib.suppress(ValueError):
        report = json.loads(printed.getvalue())
    return {"exit_code": code, "said": said.getvalue().splitlines(), "report": report}
