"""Mounts whose server was stopped: commands say what they wait for, and how to go on."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.fuse.conftest import Mounts

native = pytest.mark.parametrize("mounts", ["native"], indirect=True)


def stopped_server(mounts: Mounts) -> int:
    pid: int = json.loads(mounts.run("list", "--json").out)["mounts"][0]["pid"]
    os.kill(pid, signal.SIGSTOP)
    return pid


@native
def test_umount_says_what_it_waits_for(mounts: Mounts, sample: Path) -> None:
    directory = mounts.mount(sample)
    pid = stopped_server(mounts)
    with mounts.start("umount", directory) as waiting:
        assert waiting.stderr is not None
        said = waiting.stderr.readline()
        assert said == (
            f"tapfs: {directory}: waiting for process {pid}, which is stopped: 'kill -CONT {pid}' has it go on,"
            f" 'kill -KILL {pid}' ends it, and another one takes its place\n"
        )
        os.kill(pid, signal.SIGCONT)
        assert (waiting.wait(60), waiting.stderr.read()) == (0, "")


@native
def test_a_killed_one_is_replaced_and_unmounts(mounts: Mounts, sample: Path) -> None:
    directory = mounts.mount(sample)
    pid = stopped_server(mounts)
    with mounts.start("umount", sample) as waiting:
        assert waiting.stderr is not None
        assert f"'kill -KILL {pid}' ends it" in waiting.stderr.readline()
        os.kill(pid, signal.SIGKILL)
        assert (waiting.wait(60), waiting.stderr.read()) == (0, "")
    assert list(directory.iterdir()) == []


@native
def test_mount_does_not_wait_for_a_stopped_one(mounts: Mounts, sample: Path) -> None:
    directory = mounts.mount(sample)
    pid = stopped_server(mounts)
    for options in ([], ["--rw"]):
        again = mounts.run("mount", *options, sample, directory)
        assert again.code == 18
        assert f"is a mount point already (fuse.tapfs), served by process {pid}, which is stopped" in again.err
        assert f"kill -CONT {pid}" in again.err
    os.kill(pid, signal.SIGCONT)
    mounts.umount(directory)
