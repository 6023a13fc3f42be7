"""The key `tapfs/process`, which names the process of a disk: its pid, and when it started."""

from __future__ import annotations

import re

from tapfs.serving.processes import process_start

#: A pid and a start, because a pid is used again.
_PROCESS_NAME = re.compile(r"([0-9]{1,10}):([0-9]{1,20})")


def process_name(pid: int) -> str:
    """What `tapfs/process` says of a process: the pid and when it started, "0" if it does not run."""
    return f"{pid}:{process_start(pid) or 0}"


def parse_process_name(name: str | None) -> tuple[int, int] | None:
    """The pid and the start (`processes.process_start`) in a `process_name`; None if the text is none."""
    match = _PROCESS_NAME.fullmatch(name or "")
    return (int(match[1]), int(match[2])) if match else None


def is_alive(process: tuple[int, int] | None) -> bool:
    """Whether the process that was named runs."""
    return process is not None and process_start(process[0]) == process[1]
