"""Commands that functions of `import tapfs` start in a process of their own: their words, their password, their errors.

A process that serves is forked, and a program with threads must not fork. So `tapfs.mount` and `tapfs.serve` run
`tapfs.cli.asked_by_python`, which says by a message how the command has ended.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tapfs.serving.messages import error_from_data

_PROGRAM = ("-P", "-m", "tapfs.cli.asked_by_python")


def flag(word: str, wanted: bool) -> list[str]:  # noqa: FBT001 - the word and its value read as a pair
    """The word, if it is wanted."""
    return [word] if wanted else []


def option(word: str, value: str | None) -> list[str]:
    """An option with its value in one word, so that a value may start with a dash; nothing for None."""
    return [] if value is None else [f"{word}={value}" if word.startswith("--") else word + value]


def opening_words(
    *,
    writable: bool,
    overlay: str | os.PathLike[str] | None,
    temporary: bool,
    format: str | None,  # noqa: A002 - the word of the field
    disk: int | None,
    backing: str | None,
    backing_formats: Sequence[str],
    any_parent: bool,
    write_base: bool,
    snapshot: str | None,
    parent_folders: Sequence[str | os.PathLike[str]],
    backing_root: str | None,
    direct: bool,
    shared: bool,
    cache_bytes: int | None,
    remote_cache: str | os.PathLike[str] | None,
    remote_cache_bytes: int | None,
) -> list[str]:
    """The options of a command for keywords of `tapfs.open`. Raises TypeError for one str in place of several."""
    if isinstance(backing_formats, str):
        raise TypeError("backing_formats is a sequence, not one str")
    words = [*flag("--rw", writable), *flag("--temp", temporary)]
    words += [*flag("--direct", direct), *flag("--force-share", shared)]
    words += [*flag("--any-parent", any_parent), *flag("--write-base", write_base)]
    words += option("--disk", None if disk is None else str(disk))
    words += option("--snapshot", snapshot)
    words += option("--cache", None if cache_bytes is None else str(cache_bytes))
    words += option("--remote-cache", None if remote_cache is None else os.path.abspath(os.fsdecode(remote_cache)))
    words += option("--remote-cache-size", None if remote_cache_bytes is None else str(remote_cache_bytes))
    for folder in parent_folders:
        words += option("--parent-folder", os.fsdecode(folder))
    words += option("--overlay", None if overlay is None else os.fsdecode(overlay))
    words += [*option("--format", format), *option("--backing", backing), *option("--backing-root", backing_root)]
    for each in backing_formats:
        words += option("--backing-format", each)
    return words


def started(words: Sequence[str], names: Sequence[str], password: bytes | None) -> subprocess.Popen[bytes]:
    """The process of a command, whose standard output has its message. `names` are its file names."""
    environment = {name: value for name, value in os.environ.items() if name != "TAPFS_PASSWORD"}
    reader, writer = os.pipe()
    try:
        with os.fdopen(writer, "wb") as pipe:
            if password is not None:
                pipe.write(password + b"\n")
                words = [*words, f"--key-file=/dev/fd/{reader}"]
        return subprocess.Popen(
            [sys.executable, *_PROGRAM, *words, "--", *names],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            pass_fds=(reader,),
            env=environment,
        )
    finally:
        os.close(reader)


def raise_what_was_met(told: Mapping[str, Any]) -> None:
    """Raise the error that a command's message tells of, if it does: ImageError, or ValueError for its words."""
    if "error" in told:
        raise error_from_data(told["error"])
    if "usage" in told:
        raise ValueError(told["usage"])
