"""Ctrl-C and SIGTERM at any moment of a command: one line, never a traceback or an internal error."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from tapfs.cli import guard
from tapfs.cli.signals import Terminated
from tapfs.errors import ErrorKind, ImageError
from tapfs.host import interruption
from tapfs.serving.signals import ENDING, signals_held

#: The command, with a signal at the moment when `moment` is first imported.
_AT_AN_IMPORT = """
import os, sys
class Sender:
    def find_spec(self, name, path=None, target=None):
        if name == {moment!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), {number})
sys.meta_path.insert(0, Sender())
from tapfs.cli.entry import tapfs
sys.argv[1:] = {words!r}
sys.exit(tapfs())
"""


@pytest.mark.parametrize(
    "moment",
    [
        "tapfs.cli.main",
        "tapfs.cli.guard",
        "tapfs.cli.parser",
        "argparse",
        "gettext",
        "tapfs.cli.commands.info",
        "tapfs.cli.reporting",
        "tapfs.disk.inspection",
        "tapfs.driver",
        "tapfs.formats.qcow",
        "tapfs.kernel._engine",
        "tapfs.partitions.contents",
    ],
)
@pytest.mark.parametrize(
    ("number", "code", "line"),
    [(signal.SIGINT, 130, "tapfs: interrupted\n"), (signal.SIGTERM, 143, "tapfs: ended by SIGTERM\n")],
)
def test_while_it_loads(tmp_path: Path, moment: str, number: int, code: int, line: str) -> None:
    image = tmp_path / "a.raw"
    image.write_bytes(bytes(4096))
    script = _AT_AN_IMPORT.format(moment=moment, number=int(number), words=["info", os.fspath(image)])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", line)


def test_nothing_else_is_loaded_before_signals_are_held() -> None:
    """What is loaded before that is loaded without protection."""
    script = "import sys\nbefore = set(sys.modules)\nimport tapfs.cli.entry\nprint(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    ours = {name for name in done.stdout.split() if name.split(".")[0] == "tapfs"}
    assert ours == {"tapfs", "tapfs.cli", "tapfs.cli.entry"}
    assert not {"argparse", "signal", "typing", "enum", "re"} & set(done.stdout.split())


class _Named:
    """Python turns what `__set_name__` raises into a RuntimeError (before 3.12)."""

    def __set_name__(self, owner: type, name: str) -> None:
        raise RuntimeError(f"Error calling __set_name__ on {name}") from KeyboardInterrupt()


def _wrapped() -> None:
    class Owner:  # pyright: ignore[reportUnusedClass]
        field = _Named()


def _replaced() -> None:
    try:
        raise Terminated(signal.SIGTERM)
    finally:
        raise UnboundLocalError("save_nargs")


def _grouped() -> None:
    raise BaseExceptionGroup("several", [ValueError("x"), BaseExceptionGroup("more", [KeyboardInterrupt()])])


def _waited(number: int) -> None:
    """The error of a thread that waited, in the place of the main thread's exception."""
    interruption.interrupt(number)
    try:
        interruption.refuse_to_wait("disk", "fetch")
    except ImageError as error:
        raise ImageError(ErrorKind.IO, "cannot read", path="disk", op="read") from error


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (_wrapped, 130),
        (_replaced, 143),
        (_grouped, 130),
        (partial(_waited, signal.SIGINT), 130),
        (partial(_waited, signal.SIGTERM), 143),
    ],
)
def test_an_interruption_that_became_another_error(capfd: pytest.CaptureFixture[str], make: object, code: int) -> None:
    assert callable(make)
    assert guard.guarded("tapfs", make) == code
    assert "internal" not in capfd.readouterr().err


def test_a_bug_in_a_group_is_a_bug(capfd: pytest.CaptureFixture[str]) -> None:
    def body() -> int:
        raise BaseExceptionGroup("several", [ValueError("x")])

    assert guard.guarded("tapfs", body) == 70
    assert "internal error" in capfd.readouterr().err


def test_held_signals_come_afterwards() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    inside = False
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012, SIM117 - the order is what is tested
        with signals_held():
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) >= set(ENDING)
            inside = True
    assert inside
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
