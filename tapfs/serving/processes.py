"""Identify a process by its pid and its start time, because a pid is used again."""

from __future__ import annotations

from pathlib import Path

#: Exit codes of a process that serves a disk, beside those of an error: the disk is done; the process was asked to end
#: with the disk still there, and a successor goes on.
EXIT_DONE, EXIT_STOPPED = 0, 75


def process_start(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if it does not run (any more)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    # The command name, in parentheses, may hold anything.
    state, *rest = text.rpartition(")")[2].split()
    return None if state in "ZX" else int(rest[18])
