"""Progress: a bar on a terminal, JSON lines on request, silence in a pipe."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tapfs.cli.progress import Progress, ProgressMode

Run = Callable[..., Any]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def _run(
    stream: io.StringIO,
    mode: ProgressMode,
    *,
    seconds: float,
    steps: int = 1000,
    early: bool = False,
    fail: bool = False,
) -> str:
    """An operation of `steps` steps that takes `seconds`."""
    clock = Clock()
    try:
        with Progress("convert", mode, early=early, stream=stream, clock=clock) as progress:
            for step in range(1, steps + 1):
                clock.now += seconds / steps
                progress(step << 20, steps << 20)
                if fail and step == steps // 2:
                    raise RuntimeError
    except RuntimeError:
        pass
    return stream.getvalue()


def test_silence_where_nobody_looks() -> None:
    assert _run(io.StringIO(), ProgressMode.AUTO, seconds=60) == ""
    assert _run(io.StringIO(), ProgressMode.AUTO, seconds=60, early=True) == ""
    assert _run(Terminal(), ProgressMode.NONE, seconds=60) == ""


def test_no_bar_for_what_is_quick_unless_asked_for() -> None:
    assert _run(Terminal(), ProgressMode.AUTO, seconds=0.9) == ""
    assert "100%" in _run(Terminal(), ProgressMode.AUTO, seconds=0.9, early=True)


def test_a_bar_for_what_takes_long() -> None:
    shown = _run(Terminal(), ProgressMode.AUTO, seconds=10)
    assert shown.endswith("\n")
    assert shown.count("\n") == 1
    frames = shown.rstrip("\n").split("\r")[1:]
    assert 60 < len(frames) < 110
    shares = [int(found.group(1)) for frame in frames if (found := re.search(r" (\d+)% ", frame))]
    assert shares == sorted(shares)
    assert shares[0] >= 10
    assert shares[-1] == 100
    assert re.match(r"convert \[#+\.+\] +\d+% 100 MiB/s 0:0\d left", frames[5])


def test_a_failed_operation_takes_its_bar_away() -> None:
    shown = _run(Terminal(), ProgressMode.AUTO, seconds=10, fail=True)
    assert shown.endswith("\r\x1b[K")
    assert "\n" not in shown
    assert "100%" not in shown


def test_json_lines_are_few_and_the_last_says_all() -> None:
    stream = io.StringIO()
    lines = [json.loads(line) for line in _run(stream, ProgressMode.JSON, seconds=10).splitlines()]
    assert 20 < len(lines) <= 42
    assert all(line.keys() == {"version", "operation", "done", "total", "unit"} for line in lines)
    done = [line["done"] for line in lines]
    assert done == sorted(set(done))
    whole = 1000 << 20
    assert lines[-1] == {"version": 1, "operation": "convert", "done": whole, "total": whole, "unit": "bytes"}


def test_json_of_a_failed_operation_never_says_all() -> None:
    lines = [json.loads(line) for line in _run(io.StringIO(), ProgressMode.JSON, seconds=10, fail=True).splitlines()]
    assert lines
    assert all(line["done"] < line["total"] for line in lines)


def test_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    shown = _run(Terminal(), ProgressMode.AUTO, seconds=10)
    assert all(len(frame.removesuffix("\x1b[K")) < 20 for frame in shown.rstrip("\n").split("\r"))


def test_the_width_is_that_of_the_terminal_of_the_bar(tapfs_command: list[str], sample: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    words = [*tapfs_command, "convert", "-p", "-f", "raw", "-O", "qcow", str(sample), str(tmp_path / "a.qcow")]
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    with subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        with suppress(OSError):  # the other end is closed
            while piece := os.read(ours, 1000):
                shown += piece
        os.close(ours)
    assert process.returncode == 0
    frames = re.sub(rb"\x1b\[K|\r\n", b"", shown).split(b"\r")
    assert b"100%" in frames[-1]
    assert max(map(len, frames)) < 40


def test_convert_is_silent_in_a_pipe(tapfs_process: Run, sample: Path, tmp_path: Path) -> None:
    assert tapfs_process("convert", "-p", "-f", "raw", "-O", "qcow", sample, tmp_path / "a.qcow") == (0, "", "")


def test_convert_with_json_progress(tapfs_process: Run, sample: Path, tmp_path: Path) -> None:
    ran = tapfs_process("convert", "--progress", "json", "-f", "raw", "-O", "qcow", sample, tmp_path / "a.qcow")
    assert ran.code == 0
    last = json.loads(ran.err.splitlines()[-1])
    assert last["operation"] == "convert"
    assert last["done"] == last["total"] == sample.stat().st_size


def test_convert_on_a_terminal_shows_a_bar(tapfs_command: list[str], sample: Path, tmp_path: Path) -> None:
    child, master = pty.fork()
    words = [*tapfs_command, "convert", "-p", "-f", "raw", "-O", "qcow", str(sample), str(tmp_path / "a.qcow")]
    if child == 0:
        os.execv(words[0], words)  # noqa: S606 - the child of a pty
    shown = b""
    while True:
        try:
            piece = os.read(master, 1000)
        except OSError:
            break
        if not piece:
            break
        shown += piece
    os.close(master)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert b"convert [" in shown
    assert b"100%" in shown
