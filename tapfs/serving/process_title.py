"""Have this process listed with other arguments than it was started with, as one that was forked wants it."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from pathlib import Path

_PR_SET_MM, _PR_SET_MM_ARG_END = 35, 9

#: Fields of /proc/self/stat, counted behind the command name (proc(5)): the bounds of the arguments in memory.
_ARG_START, _ARG_END = 45, 46


def title_over(arguments: list[str]) -> None:
    """Write the program's name and `arguments` over the arguments that this process has; what is too long is cut.

    The memory is ours alone after a fork. Where the host does not let us shorten it, zeros remain behind.
    """
    with suppress(OSError, ValueError, IndexError):
        fields = Path("/proc/self/stat").read_text(errors="replace").rpartition(")")[2].split()
        start, end = int(fields[_ARG_START]), int(fields[_ARG_END])
        title = b"\0".join(word.encode() for word in (sys.executable, *arguments))[: end - start - 1] + b"\0"
        ctypes.memset(start, 0, end - start)
        ctypes.memmove(start, title, len(title))
        ctypes.CDLL(None).prctl(_PR_SET_MM, _PR_SET_MM_ARG_END, ctypes.c_ulong(start + len(title)), 0, 0)
