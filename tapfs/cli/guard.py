"""The guard around every command: it turns errors into one line and an exit code, and signals into exceptions."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from types import FrameType

from tapfs.cli import json_output
from tapfs.cli.json_output import print_json
from tapfs.cli.parser import UsageError
from tapfs.cli.signals import Terminated, interruption_in, release_signals, wait_ended_in
from tapfs.errors import EXIT_BUG, EXIT_INTERRUPTED, EXIT_USAGE, ImageError, from_os_error, options_as, printable
from tapfs.host import interruption
from tapfs.records import NamedTuple
from tapfs.serving.signals import ENDING

#: The exit code that a shell reports after SIGPIPE. tapfs ends so when its reader goes away.
EXIT_BROKEN_PIPE = 128 + signal.SIGPIPE


class _Failure(NamedTuple):
    """How a command failed: its exit code, the line for stderr, and what JSON says of it."""

    exit_code: int
    line: str
    data: dict[str, object]


def guarded(
    program: str,
    body: Callable[[], int],
    *,
    ends_process: bool = False,
    json: bool = False,
    options_way: str = "command_line",
) -> int:
    """Run `body` and return its exit code, or print one line on stderr and return the error's.

    `ends_process`: nothing but the exit comes after it, so what is done stays done: a signal that
    comes too late is ignored. `json`: an error is an object on standard output, too.
    `options_way`: how messages write options (`tapfs.errors.options_as`).
    """
    with options_as(options_way):
        return _guarded(program, body, ends_process=ends_process, json=json)


def _guarded(program: str, body: Callable[[], int], *, ends_process: bool, json: bool) -> int:
    _fill_standard_descriptors()
    _write_output_whole()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    _print_warnings(program)
    json_output.begun = False
    try:
        with _signals_as_exceptions(ignored_after=ends_process):
            release_signals()
            return _with_output_flushed(body)
    except BaseException as error:  # noqa: BLE001  the last line of defence: a bug is reported, never dumped
        if isinstance(error, BrokenPipeError):
            _abandon_output()
            return EXIT_BROKEN_PIPE
        failure = _failure_of(error)
        _flush_output(failure if json and not json_output.begun else None)
        complain(program, failure.line)
        return failure.exit_code


def _failure_of(error: BaseException) -> _Failure:
    if isinstance(error, UsageError):
        line = f"error: {error}; see '{error.program} --help'"
        return _Failure(EXIT_USAGE, line, {"kind": "usage", "message": str(error)})
    # A thread's error may come in the place of the main thread's exception, or before it.
    error = wait_ended_in(error) or error
    if isinstance(error, MemoryError):
        error = OSError(errno.ENOMEM, "")
    if isinstance(error, OSError) and not isinstance(error, ImageError):
        error = from_os_error(error, path=_path_of(error), op=_operation_of(error))
    if isinstance(error, ImageError):
        return _Failure(error.exit_code, f"error: {error}", _data_of(error))
    interruption = interruption_in(error)
    if isinstance(interruption, Terminated):
        line = f"ended by {signal.Signals(interruption.signal_number).name}"
        return _Failure(128 + interruption.signal_number, line, {"kind": "interrupted", "message": line})
    if interruption is not None:
        return _Failure(EXIT_INTERRUPTED, "interrupted", {"kind": "interrupted", "message": "interrupted"})
    if os.environ.get("TAPFS_DEBUG"):
        sys.excepthook(type(error), error, error.__traceback__)
    message = f"internal error: {type(error).__name__}: {error}"
    return _Failure(
        EXIT_BUG, f"{message}; please report; TAPFS_DEBUG=1 shows the traceback", {"kind": "bug", "message": message}
    )


def _data_of(error: ImageError) -> dict[str, object]:
    return {
        "kind": str(error.kind),
        "message": error.message,
        "path": error.path,
        "offset": error.offset,
        "operation": error.op,
        "remedy": error.remedy,
    }


def _print_warnings(program: str) -> None:
    def show(message: Warning | str, *_: object, **__: object) -> None:
        complain(program, f"warning: {message}")

    warnings.showwarning = show


#: The standard streams that were closed when the program started, by their descriptors.
closed_streams: set[int] = set()


def _fill_standard_descriptors() -> None:
    """Have 0, 1 and 2 open: an image must not get the number of a closed standard stream."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        closed_streams.add(descriptor)
    os.close(descriptor)
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:  # what Python makes of a stream that was closed when it started
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def _write_output_whole() -> None:
    """Put a buffer before standard output where Python was told to have none (``PYTHONUNBUFFERED``).

    Without one a write that the host takes in part loses the rest without an error: on a disk that gets full, say.
    """
    stream = sys.__stdout__
    if sys.stdout is not stream or not isinstance(stream, io.TextIOWrapper):
        return  # one that somebody else has put there
    if isinstance(stream.buffer, io.RawIOBase):
        encoding, number = stream.encoding, stream.fileno()
        stream.detach()
        sys.stdout = os.fdopen(number, "w", buffering=1, encoding=encoding, closefd=False)


def complain(program: str, text: str) -> None:
    """One line on stderr, if there is one."""
    with suppress(OSError, AttributeError):
        sys.stderr.write(f"{program}: {printable(' '.join(text.splitlines()))}\n")
        sys.stderr.flush()


def _with_output_flushed(body: Callable[[], int]) -> int:
    """Flush inside the guard, so that a full disk or a closed pipe behind stdout is reported like the rest."""
    try:
        code = body()
    except SystemExit as request:  # argparse after --help and --version
        code = request.code if isinstance(request.code, int) else 0
    try:
        if sys.stdout is not None:  # pyright: ignore[reportUnnecessaryComparison]  closed by the shell (>&-)
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _abandon_output()
        raise from_os_error(error, path=None, op="write to standard output") from error
    return code


def _flush_output(failure: _Failure | None) -> None:
    """Bring out what was printed, and the failure as JSON if there is one. A broken output is let go of."""
    try:
        if failure is not None:
            print_json({"error": {**failure.data, "exit_code": failure.exit_code}})
        sys.stdout.flush()
    except (OSError, AttributeError):
        _abandon_output()


def _path_of(error: OSError) -> str | None:
    return None if error.filename is None else os.fsdecode(error.filename)


def _operation_of(error: OSError) -> str:
    if error.filename is not None:
        return "open"
    # Whoever writes to a file says so in an ImageError: what is left is print().
    return "write to standard output" if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT) else "go on"


def _abandon_output() -> None:
    """Let the interpreter's own flush at exit fall into the void."""
    with suppress(OSError):
        void = os.open(os.devnull, os.O_WRONLY)
        os.dup2(void, 1)
        os.close(void)


@contextmanager
def _signals_as_exceptions(*, ignored_after: bool) -> Generator[None]:
    """SIGINT, SIGTERM and SIGHUP raise, once: what comes while the command cleans up is ignored."""
    caught = list(ENDING)

    def handle(number: int, _frame: FrameType | None) -> None:
        for each in caught:
            signal.signal(each, signal.SIG_IGN)
        interruption.interrupt(number)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise Terminated(number)

    # Who was started to ignore a signal (nohup, a background job of a script) goes on ignoring it.
    interruption.forget()
    previous = {number: signal.getsignal(number) for number in caught}
    caught = [number for number in caught if previous[number] is not signal.SIG_IGN]
    for number in caught:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, signal.SIG_IGN if ignored_after else previous[number])
