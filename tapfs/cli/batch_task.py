"""The tasks of a batch, as a worker process does them: a command of tapfs by its words."""

from __future__ import annotations

import contextlib
import io
import json
import os
from typing import cast

from tapfs.cli.main import run_command
from tapfs.cli.parser import UsageError
from tapfs.errors import ErrorKind, ImageError, options_as
from tapfs.many.tasks import Task


def answer(task: Task) -> object:
    """Run the command; its exit code, what it says on standard error, and the JSON that it prints, if it prints any.

    The task has `command`, `words`, and the `folder` that relative names start at. Raises ImageError.
    """
    folder = cast("str", task["folder"])
    if os.getcwd() != folder:
        os.chdir(folder)
    printed, said = io.StringIO(), io.StringIO()
    with options_as("command_line"), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
        try:
            code = run_command(cast("str", task["command"]), cast("list[str]", task["words"]))
        except UsageError as error:
            raise ImageError(ErrorKind.INVALID_ARGUMENT, str(error), op="read the command line") from error
    report: object = None
    with contextlib.suppress(ValueError):
        report = json.loads(printed.getvalue())
    return {"exit_code": code, "said": said.getvalue().splitlines(), "report": report}
