"""The cluster: a real scheduler and two workers, one of which is killed in the middle. Everything is done once."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tapfs as library
from tapfs.many.cluster import BATCH_SECONDS, MOST_IMAGES, Batches
from tests.conftest import REPOSITORY, Ran

MIB = 1 << 20
IMAGES = 12


@contextlib.contextmanager
def program(*words: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """One of Dask's programs, ended with the block."""
    environment = os.environ | {"DASK_TEMPORARY_DIRECTORY": str(folder), "DASK_DISTRIBUTED__ADMIN__TICK__LIMIT": "1h"}
    command = [sys.executable, "-m", *words]
    with (folder / f"{words[0]}.log").open("ab") as log:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(what: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not what():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_batch_goes_on_when_a_worker_is_killed(tapfs_command: list[str], tmp_path: Path) -> None:
    for number in range(IMAGES):
        (tmp_path / f"{number}.raw").write_bytes(os.urandom(MIB))
    batch, journal = tmp_path / "list", tmp_path / "list.done"
    batch.write_text("".join(f"{number}.raw {number}.qcow2 -f raw\n" for number in range(IMAGES)))
    said = tmp_path / "scheduler.json"
    scheduling = ("distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")
    with contextlib.ExitStack() as stack:
        stack.enter_context(program(*scheduling, "--scheduler-file", str(said), folder=tmp_path))
        wait_for(said.exists)
        working = ("distributed.cli.dask_worker", "--scheduler-file", str(said))
        alone = ("--nthreads", "1", "--no-nanny", "--no-dashboard", "--memory-limit", "0")
        workers = [stack.enter_context(program(*working, *alone, folder=tmp_path)) for _ in range(2)]
        address = json.loads(said.read_text())["address"]
        # The rate makes an image last: what is killed is at work.
        words = ["convert", "--batch", "list", "-O", "qcow2", "-r", "3M", "--scheduler", address]
        command = subprocess.Popen(
            [*tapfs_command, *words], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        wait_for(lambda: command.poll() is not None or (journal.exists() and journal.read_text().count("\n") >= 2))
        workers[0].kill()
        out, err = command.communicate(timeout=120)
        assert (command.returncode, out, err) == (0, f"{IMAGES} done\n", "")
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert sorted(line["result"]["line"] for line in lines) == list(range(1, IMAGES + 1))
    made = sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".qcow2" or path.name.startswith("."))
    assert made == sorted(f"{number}.qcow2" for number in range(IMAGES))
    for number in range(IMAGES):
        assert library.compare(tmp_path / f"{number}.raw", tmp_path / f"{number}.qcow2", left_format="raw") is None


def test_a_batch_is_as_large_as_fits_into_its_time() -> None:
    batches = Batches(threads=4)
    assert batches.size(100_000) == 1  # nothing is known yet
    batches.note(1, 0.01)
    assert batches.size(100_000) == int(BATCH_SECONDS * 100)
    assert batches.size(80) == 10  # all threads have something at the end
    assert batches.size(1) == 1
    batches.note(100_000, 0.0)
    assert batches.size(1 << 30) == MOST_IMAGES


def test_what_keeps_a_cluster_from_working_is_said(tapfs_process: Callable[..., Ran], tmp_path: Path) -> None:
    ran = tapfs_process("survey", tmp_path, "--scheduler", "tcp://127.0.0.1:1")
    assert ran.code == 10
    assert "the scheduler tcp://127.0.0.1:1 does not answer" in ran.err
    assert ran.err.count("\n") == 1
    assert tapfs_process("survey", tmp_path, "--scheduler", "x", "--jobs", "2").code == 64


@pytest.mark.parametrize("option", ["--scheduler", "--jobs", "--timeout", "--memory", "--journal"])
def test_options_of_a_batch_go_with_a_batch(tapfs: Callable[..., Ran], option: str) -> None:
    ran = tapfs("check", "x", option, "1")
    assert ran.code == 64
    assert f"{option} goes with --batch" in ran.err
