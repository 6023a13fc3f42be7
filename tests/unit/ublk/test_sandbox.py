"""The process of a block device opens its image in a sandbox: a driver that is evil on purpose gets nowhere in it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.evil_driver import ATTEMPTS, EvilDriver
from tests.web_server import web_server

#: What the process does before it serves, without the driver of the kernel.
_PROGRAM = """
import sys
from pathlib import Path
from tapfs.disk.plan_log import PlanLog
from tapfs.ublk import process
from tapfs.ublk.record import DiskRecord
image, mode, folder = sys.argv[1:]
process._NAME_SECONDS = 0
record = DiskRecord(0, image, "token", mode=mode)
process._enter_sandbox(record)
opened = process._open(record, PlanLog(Path(folder, "plan"), "token"), served_before=False)
opened.read(0, 4096)
opened.close()
"""


@pytest.fixture
def evil(tmp_path: Path) -> Iterator[EvilDriver]:
    made = EvilDriver(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize(("mode", "left"), [("r", set()), ("w", {"write beside", "overwrite beside"})])
def test_an_evil_driver_gets_nowhere(evil: EvilDriver, tmp_path: Path, mode: str, left: set[str]) -> None:
    environment = os.environ | evil.environment | {"TAPFS_RUNTIME_DIR": str(tmp_path / "runtime")}
    command = [sys.executable, "-c", _PROGRAM, evil.image, mode, tmp_path]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert evil.done() == dict.fromkeys(("probe", "open", "map"), left), evil.results()
    assert all(set(each) == ATTEMPTS for each in evil.results().values())


def test_the_process_of_a_disk_that_lies_elsewhere_has_no_network(evil: EvilDriver, tmp_path: Path) -> None:
    environment = os.environ | evil.environment | {"TAPFS_RUNTIME_DIR": str(tmp_path / "runtime")}
    with web_server(evil.image.read_bytes()) as server:
        command = [sys.executable, "-c", _PROGRAM, f"{server.url}/disk.evil", "r", tmp_path]
        ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert evil.done() == {moment: set() for moment in ("probe", "open", "map")}, evil.results()
    assert all(set(each) == ATTEMPTS for each in evil.results().values())
