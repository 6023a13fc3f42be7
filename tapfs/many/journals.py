"""Journals: files of lines, each of which says what is done; the last one may have been cut off by a kill."""

from __future__ import annotations

import os
from typing import BinaryIO


def open_journal(path: str, *, empty: bool = False) -> BinaryIO:
    """Open a journal, or make it, to read it and to append to it; `empty`: without the lines that it has.

    Raises OSError.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | (os.O_TRUNC if empty else 0)
    return os.fdopen(os.open(path, flags, 0o666), "r+b")


def whole_lines(file: BinaryIO) -> list[bytes]:
    """The lines of an open journal. A last one that was cut off is taken away, so that the next begins a line.

    A file without any line end that does not begin as a line of ours is no journal: it is given as one line, and stays.
    """
    data = file.read()
    end = data.rfind(b"\n") + 1
    if end == 0 and data and not data.startswith(b'{"version"'[: len(data)]):
        return [data]
    if end < len(data):
        file.truncate(end)
    return [line for line in data[:end].split(b"\n") if line]
