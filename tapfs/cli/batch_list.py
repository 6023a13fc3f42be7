"""Batch lists: the images that `convert --batch` and `check --batch` work on, one a line."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from typing import NamedTuple, cast

from tapfs.cli.parser import Parser, UsageError
from tapfs.errors import ErrorKind, ImageError, from_os_error

#: Options of the whole batch that take a value.
_OF_THE_BATCH = frozenset({"--batch", "--journal", "--jobs", "--timeout", "--memory", "--scheduler", "--progress"})


class Entry(NamedTuple):
    """A line of the list: its number, the words of its command, the images that it reads and the one that it makes."""

    line: int
    words: tuple[str, ...]
    sources: tuple[str, ...]
    target: str | None


def read_list(name: str, common: Sequence[str], parser: Parser) -> list[Entry]:
    """The entries of a list; `-` is standard input. `common` are the words of the batch's own command line.

    A line has the words of a command, as a shell takes them apart, or is a JSON object with `source` (a name, or a list
    of them), `target` and `options` (a list of words). Empty lines, and lines that begin with #, are left out.
    Raises ImageError, also where two lines make one target.
    """
    shared = common_words(common)
    entries: list[Entry] = []
    targets: dict[str, int] = {}
    for number, line in enumerate(_lines_of(name), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            entry = _entry(number, [*shared, *_words_of(line)], parser)
        except (UsageError, ValueError) as error:
            raise _wrong(name, number, str(error)) from error
        if entry.target is not None:
            if entry.target in targets:
                raise _wrong(name, number, f"makes {entry.target}, as line {targets[entry.target]} does")
            targets[entry.target] = number
        entries.append(entry)
    return entries


def common_words(words: Sequence[str]) -> list[str]:
    """The words of a command line without those that are of the batch and not of one image."""
    kept: list[str] = []
    rest = list(reversed(words))
    while rest:
        word = rest.pop()
        if word.partition("=")[0] not in _OF_THE_BATCH:
            kept.append(word)
        elif "=" not in word and rest:
            rest.pop()
    return [word for word in kept if word not in ("--json", "--output=json")]


def _lines_of(name: str) -> list[str]:
    try:
        if name == "-":
            return sys.stdin.read().splitlines()
        with open(name, encoding="utf-8", errors="surrogateescape") as file:
            return file.read().splitlines()
    except OSError as error:
        raise from_os_error(error, path=name, op="read the list") from error


def _words_of(line: str) -> list[str]:
    if not line.lstrip().startswith("{"):
        return shlex.split(line)
    found = cast("dict[str, object]", json.loads(line))
    source, target, options = found.pop("source", None), found.pop("target", None), found.pop("options", [])
    if found:
        raise ValueError(f"no such key: {next(iter(found))} (there are source, target and options)")
    sources = cast("list[object]", source) if isinstance(source, list) else [source]
    names = [*sources, *([] if target is None else [target])]
    own = cast("list[object]", options) if isinstance(options, list) else [None]
    if not all(isinstance(word, str) for word in (*names, *own)):
        raise ValueError("source and target are names, options is a list of words")
    return cast("list[str]", [*own, "--", *names])


def _entry(number: int, words: list[str], parser: Parser) -> Entry:
    arguments = parser.parse(words)
    if getattr(arguments, "batch", None) is not None:
        raise ValueError("--batch goes with no line of a list")
    named: list[str | None] = list(arguments.names) if hasattr(arguments, "names") else [arguments.image]
    names = [name for name in named if name is not None]
    if "-" in names:
        raise ValueError("standard input and output are of the whole batch: name files")
    if hasattr(arguments, "names"):
        if len(names) < 2:
            raise ValueError("SOURCE and TARGET are needed")
        return Entry(number, tuple(words), tuple(names[:-1]), names[-1])
    if not names:
        raise ValueError("IMAGE is needed")
    return Entry(number, tuple(words), tuple(names), None)


def _wrong(name: str, number: int, message: str) -> ImageError:
    text = f"line {number}: {message}"
    return ImageError(ErrorKind.INVALID_ARGUMENT, text, path=name, op="read the list", remedy="correct the line")
