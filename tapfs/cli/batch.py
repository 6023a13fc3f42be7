"""Batches: one command over many images, by worker processes, with a journal of what is done."""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, NamedTuple, Self, TypedDict, cast

from tapfs.cli.batch_list import Entry, read_list
from tapfs.cli.many_options import runner_of
from tapfs.cli.parser import CommandParsers
from tapfs.cli.reporting import print_line, progress_of
from tapfs.cli.sandboxed import add_sandbox_option
from tapfs.errors import CODES, EXIT_BUG, ErrorKind, ImageError, from_os_error, printable
from tapfs.many.journals import open_journal, whole_lines

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Mapping

    from tapfs.many.tasks import Answer

_HANDLER = "tapfs.cli.batch_task"
_VERSION = 1

#: Seconds that one image may take where nobody says it.
_SECONDS = 24 * 3600


class Result(TypedDict):
    """What came of one line; docs/json/batch.schema.json describes each key."""

    line: int
    sources: list[str]
    target: str | None
    exit_code: int
    as_before: bool
    said: list[str]
    report: object
    error: dict[str, object] | None


class Kind(NamedTuple):
    """A command that takes batches.

    `final`: exit codes of a line that is done, whatever it says. `worst` makes one exit code of those of all lines.
    """

    name: str
    final: frozenset[int]
    worst: Callable[[Iterable[int]], int]


def first_failure(codes: Iterable[int]) -> int:
    """The first code that is not 0, else 0."""
    return next((code for code in codes if code), 0)


def run_batch(arguments: argparse.Namespace, kind: Kind, parser_of: Callable[[CommandParsers], None]) -> int:
    """Do the command for each line of the list that the journal does not have; the exit code of all lines."""
    program = f"tapfs {kind.name}"
    parsers = CommandParsers()
    parser_of(parsers)
    add_sandbox_option(kind.name, parsers.parsers[kind.name])
    words = cast("list[str]", arguments.command_words)
    entries = read_list(arguments.batch, words, parsers.parsers[kind.name])
    path: str | None = arguments.journal
    if path is None and arguments.batch != "-":
        path = f"{arguments.batch}.done"
    results: dict[int, Result] = {}
    with ExitStack() as stack:
        journal = None if path is None else stack.enter_context(_Journal(path, kind.name))
        left: list[Entry] = []
        for entry in entries:
            done = None if journal is None else journal.result(entry)
            if done is None:
                left.append(entry)
            else:
                results[entry.line] = {**done, "line": entry.line, "as_before": True}
        folder = os.getcwd()
        extra = ["--json"] if kind.name == "check" else ["-q"]
        tasks = [{"command": kind.name, "words": [*extra, *entry.words], "folder": folder} for entry in left]
        runner = stack.enter_context(
            runner_of(arguments, _HANDLER, timeout_seconds=_SECONDS, together=1, program=program)
        )
        with progress_of(arguments, kind.name, unit="images") as progress:
            for number, answer in runner.answers(tasks):
                entry = left[number]
                result = _result(entry, answer)
                results[entry.line] = result
                if journal is not None and result["exit_code"] in kind.final:
                    journal.note(entry, result)
                if not arguments.json:
                    _complain(arguments.batch, result)
                progress(len(results), len(entries))
    ordered = [results[entry.line] for entry in entries]
    _show(arguments, kind, ordered)
    return kind.worst(result["exit_code"] for result in ordered)


def _result(entry: Entry, answer: Answer) -> Result:
    error = cast("dict[str, object] | None", answer.get("error"))
    done = cast("Mapping[str, object]", answer.get("result") or {})
    code = cast("int", done["exit_code"]) if error is None else _code_of(error)
    return {
        "line": entry.line,
        "sources": list(entry.sources),
        "target": entry.target,
        "exit_code": code,
        "as_before": False,
        "said": cast("list[str]", done.get("said") or []),
        "report": done.get("report"),
        "error": error,
    }


def _code_of(error: Mapping[str, object]) -> int:
    """The exit code that the command itself would have had."""
    with suppress(ValueError):
        return CODES[ErrorKind(cast("str", error["kind"]))].exit_code
    return EXIT_BUG if error["kind"] == "bug" else CODES[ErrorKind.IO].exit_code


def _complain(name: str, result: Result) -> None:
    """Say on stderr what a line has to say."""
    from tapfs.cli.guard import complain

    place = f"{printable(name)}:{result['line']}"
    for text in result["said"]:
        complain("tapfs", f"{place}: {text.removeprefix('tapfs: ')}")
    error = result["error"]
    if error is not None:
        where = f"{error['path']}: " if error["path"] is not None else ""
        remedy = f"; {error['remedy']}" if error["remedy"] else ""
        complain("tapfs", f"{place}: {where}{error['message']}{remedy}")


def _show(arguments: argparse.Namespace, kind: Kind, results: list[Result]) -> None:
    if arguments.json:
        from tapfs.cli.json_output import print_json

        print_json({"command": kind.name, "results": results})
        return
    if arguments.quiet:
        return
    if kind.name == "check":
        for result in results:
            if result["error"] is None:
                print_line(f"{result['sources'][0]}: {_verdict(result)}")
    failed = sum(result["error"] is not None for result in results)
    before = sum(result["as_before"] for result in results)
    done = len(results) - failed - before
    parts = [f"{done} done"]
    parts += [f"{before} as before"] if before else []
    parts += [f"{failed} failed"] if failed else []
    print_line(", ".join(parts))


def _verdict(result: Result) -> str:
    report = cast("dict[str, object]", result["report"])
    if not report["checked"]:
        return f"not checked: {report['unchecked']}"
    if report["corruptions"]:
        return f"corrupt: {report['corruptions']} errors, {report['leaks']} leaks"
    return f"{report['leaks']} leaks" if report["leaks"] else "no errors"


class _Journal:
    """The lines that are done: their words, the states of their files then, and their results."""

    def __init__(self, path: str, command: str) -> None:
        """Open or make the journal; it is one process's at a time. Raises ImageError."""
        self._path = path
        self._command = command
        self._done: dict[tuple[str, ...], tuple[object, Result]] = {}
        try:
            self._file = open_journal(path)
        except OSError as error:
            raise from_os_error(error, path=path, op="open the journal") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for line in whole_lines(self._file):
                self._take(line)
        except BlockingIOError as error:
            self._file.close()
            message = "is the journal of a batch that runs"
            raise ImageError(ErrorKind.LOCKED, message, path=path, op="open the journal") from error
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def result(self, entry: Entry) -> Result | None:
        """What came of a line, if it is done and its files are as they were then."""
        found = self._done.get(entry.words)
        return found[1] if found is not None and found[0] == _states(entry) else None

    def note(self, entry: Entry, result: Result) -> None:
        """Keep what came of a line. Raises ImageError."""
        record = {"version": _VERSION, "command": self._command, "words": entry.words, "result": result}
        self._write(json.dumps({**record, "states": _states(entry)}) + "\n")

    def _take(self, line: bytes) -> None:
        try:
            record = json.loads(line)
            if record["version"] != _VERSION or record["command"] != self._command:
                raise ValueError(record["version"])
            self._done[tuple(record["words"])] = record["states"], record["result"]
        except (ValueError, KeyError, TypeError) as error:
            raise ImageError(
                ErrorKind.INVALID_FORMAT,
                f"is no journal of tapfs {self._command} --batch",
                path=self._path,
                op="read the journal",
                remedy="name another with --journal",
            ) from error

    def _write(self, text: str) -> None:
        try:
            self._file.write(text.encode())
            self._file.flush()
        except OSError as error:
            raise from_os_error(error, path=self._path, op="write the journal") from error


def _states(entry: Entry) -> list[list[int] | None]:
    """The files of a line: device, inode, bytes, time of change; None where there is none, or an address."""
    found: list[list[int] | None] = []
    for name in (*entry.sources, *([] if entry.target is None else [entry.target])):
        try:
            status = os.stat(name)
        except (OSError, ValueError):
            found.append(None)
        else:
            found.append([status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns])
    return found
