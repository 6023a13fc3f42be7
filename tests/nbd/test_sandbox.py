"""A server of images looks at them in a sandbox: a driver that is evil on purpose gets nowhere in it."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Ran
from tests.evil_driver import ATTEMPTS, EvilDriver

Run = Callable[..., Ran]


@pytest.fixture
def evil(tmp_path: Path) -> Iterator[EvilDriver]:
    made = EvilDriver(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("options", [[], ["--no-sandbox"]], ids=["sandbox", "without"])
def test_an_evil_driver_gets_nowhere(tapfs_process: Run, evil: EvilDriver, tmp_path: Path, options: list[str]) -> None:
    environment = os.environ | evil.environment | {"TAPFS_RUNTIME_DIR": str(tmp_path / "runtime")}
    listening, number = tmp_path / "server" / "socket", tmp_path / "server" / "pid"
    listening.parent.mkdir()
    words = ["serve", *options, evil.image, "--socket", listening, "--pid-file", number, "--background"]
    ran = tapfs_process(*words, env=environment)
    assert (ran.code, ran.err) == (0, "")
    pid = int(number.read_text())
    server = os.pidfd_open(pid)
    copied = tapfs_process("convert", f"nbd+unix:///?socket={listening}", "-O", "raw", tmp_path / "copy")
    assert copied == Ran(0, "", "")
    assert (tmp_path / "copy").read_bytes() == evil.image.read_bytes()
    listed = tapfs_process("list", env=environment).out
    assert ("no sandbox" in listed) == bool(options), listed
    signal.pidfd_send_signal(server, signal.SIGTERM)
    select.select([server], [], [])
    assert evil.done(pid) == {"map": ATTEMPTS if options else set()}, evil.results()
    assert list(listening.parent.iterdir()) == []
