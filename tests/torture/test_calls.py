"""System calls that fail one at a time: a sample of the part `calls` of `make torture`, and what it would notice."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest

from tests.torture import commands
from tests.torture.calls import Ended, Fault, faults
from tests.torture.commands import Command, judge


def test_a_sample_of_the_calls_of_create() -> None:
    assert commands.main(["--only", "create-qcow2", "--share", "0.06", "--seed", "3"]) == 0


def _copies(folder: Path, *, careless: bool) -> list[str]:
    """A program that writes its target in two steps, and may believe that each succeeds."""
    step = "try:\n os.pwrite(f, b'12', {0})\nexcept OSError as e:\n {1}\n"
    failing = "pass" if careless else "os.unlink(n); print(e); sys.exit(10)"
    program = f"import os, sys\nn = {str(folder / 'target')!r}\nf = os.open(n, os.O_RDWR | os.O_CREAT)\n"
    return [sys.executable, "-S", "-c", program + step.format(0, failing) + step.format(2, failing)]


def _look(folder: Path, ended: Ended) -> None:
    target = folder / "target"
    assert target.exists() == (ended.status == 0)
    assert ended.status != 0 or target.read_bytes() == b"1212"


def _command(*, careless: bool) -> Command:
    return Command(lambda _: None, partial(_copies, careless=careless), _look)


def test_calls_on_the_folder_are_found(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    ended, found = faults(_copies(tmp_path / "files", careless=False), tmp_path / "files", tmp_path / "log")
    assert ended.status == 0
    assert {fault for fault in found if fault.call == "pwrite64"} == {
        Fault("pwrite64", number, error) for number in (1, 2) for error in ("EIO", "ENOSPC", "EINTR")
    }


def test_a_program_that_does_not_look_at_errors_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, careless in (("careful", False), ("careless", True)):
        (tmp_path / name).mkdir()
        monkeypatch.setitem(commands.COMMANDS, name, _command(careless=careless))
    fault = Fault("pwrite64", 2, "ENOSPC")
    assert judge("careful", fault, tmp_path / "careful").counts == {"system calls failed": 1}
    with pytest.raises(AssertionError):
        judge("careless", fault, tmp_path / "careless")
