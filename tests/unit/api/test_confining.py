"""`tapfs.enter_sandbox`: a program names what it needs, and a driver that is evil on purpose gets no more."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.evil_driver import ATTEMPTS, EvilDriver

#: What the program says it needs, then its image, and a folder in which it makes a file.
_PROGRAM = """
import sys
import tapfs
image, folder = sys.argv[1:]
{enter}
with tapfs.open(image) as disk:
    data = disk.read(0, 4096)
with open(folder + "/result", "wb") as result:
    result.write(data)
"""


@pytest.fixture
def evil(tmp_path: Path) -> Iterator[EvilDriver]:
    made = EvilDriver(tmp_path)
    yield made
    made.close()


def run(evil: EvilDriver, folder: Path, enter: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir()
    command = [sys.executable, "-c", _PROGRAM.format(enter=enter), evil.image, folder]
    environment = os.environ | evil.environment
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_an_evil_driver_gets_nowhere(evil: EvilDriver, tmp_path: Path) -> None:
    ran = run(evil, tmp_path / "made", "print(tapfs.enter_sandbox(read=[image], make=[folder]))")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "on\n", "")
    assert evil.done() == {"probe": set(), "open": set(), "map": set()}, evil.results()
    assert (tmp_path / "made/result").read_bytes() == evil.image.read_bytes()[:4096]


def test_without_the_call_it_gets_everywhere(evil: EvilDriver, tmp_path: Path) -> None:
    assert run(evil, tmp_path / "made", "").returncode == 0
    assert evil.done()["open"] == ATTEMPTS


def test_it_is_refused_beside_other_threads_and_twice(evil: EvilDriver, tmp_path: Path) -> None:
    threads = "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start(); "
    ran = run(evil, tmp_path / "one", threads + "tapfs.enter_sandbox(read=[image])")
    assert "more than one thread" in ran.stderr
    ran = run(evil, tmp_path / "two", "tapfs.enter_sandbox(read=[image]); tapfs.enter_sandbox()")
    assert "in its sandbox already" in ran.stderr
