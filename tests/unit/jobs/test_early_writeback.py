"""A copy has the host write back while it goes on, and is the same where the host gives no thread for it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import tapfs
from tapfs.jobs import early_writeback
from tapfs.jobs.convert import convert_to_new
from tapfs.jobs.create import NewImage
from tapfs.jobs.early_writeback import EarlyWriteback
from tapfs.kernel.engine import EngineDisk

MIB = 1 << 20


def _threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "tapfs writeback"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[threading.Thread]:
    """The thread of each call that told the host to write back."""
    seen: list[threading.Thread] = []
    start_writeback = EngineDisk.start_writeback

    def noted(self: EngineDisk) -> None:
        seen.append(threading.current_thread())
        start_writeback(self)

    monkeypatch.setattr(EngineDisk, "start_writeback", noted)
    monkeypatch.setattr(early_writeback, "_STEP_BYTES", MIB)
    return seen


@pytest.mark.parametrize("compressed", [False, True])
def test_a_copy_is_written_back_by_another_thread(
    tmp_path: Path, calls: list[threading.Thread], *, compressed: bool
) -> None:
    content = os.urandom(40 * MIB)
    (tmp_path / "source").write_bytes(content)
    with tapfs.open(tmp_path / "source", format="raw") as source:
        new = NewImage(format="qcow2", size=source.size)
        convert_to_new(source, str(tmp_path / "target"), new, compressed=compressed)
    with tapfs.open(tmp_path / "target") as target:
        assert target.read(0, target.size) == content
    assert calls
    assert threading.current_thread() not in calls
    assert _threads() == []


@pytest.mark.parametrize(("piece", "written_back"), [(4096, False), (64 << 10, True)])
def test_scattered_pieces_are_left_to_the_barrier(
    tmp_path: Path, calls: list[threading.Thread], piece: int, *, written_back: bool
) -> None:
    """Each lies alone in a block of the VHD, a page in many."""
    with (tmp_path / "source").open("wb") as file:
        file.truncate(32 * MIB)
        for place in range(0, 32 * MIB, 128 << 10):
            os.pwrite(file.fileno(), b"x" * piece, place)
    with tapfs.open(tmp_path / "source", format="raw") as source:
        convert_to_new(source, str(tmp_path / "target"), NewImage(format="vhd", size=source.size))
    assert bool(calls) == written_back


def test_a_plain_copy_is_written_back_window_by_window(tmp_path: Path) -> None:
    source, log = tmp_path / "source", tmp_path / "log"
    source.write_bytes(b"x" * 24 * MIB)
    convert = [
        Path(sys.executable).with_name("tapfs"),
        "convert",
        "-f",
        "raw",
        "-O",
        "raw",
        source,
        tmp_path / "target",
    ]
    subprocess.run(["strace", "-f", "-qq", "-e", "trace=sync_file_range", "-o", log, *convert], check=True)
    told = re.findall(r"sync_file_range\(\d+, (\d+), (\d+), SYNC_FILE_RANGE_WRITE", log.read_text())
    assert sorted((int(offset), int(length)) for offset, length in told) == [
        (offset, 8 * MIB) for offset in range(0, 24 * MIB, 8 * MIB)
    ]


def test_the_host_is_told_after_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk").write_bytes(bytes(MIB))
    told = threading.Event()
    monkeypatch.setattr(EngineDisk, "start_writeback", lambda _: told.set())
    monkeypatch.setattr(early_writeback, "_STEP_BYTES", MIB)
    with tapfs.open(tmp_path / "disk", format="raw") as disk:
        with EarlyWriteback(disk.engine_disk) as writeback:
            writeback.wrote(MIB - 1)
        assert not told.is_set()
        with EarlyWriteback(disk.engine_disk) as writeback:
            writeback.wrote(MIB - 1)
            writeback.wrote(1)
            assert told.wait(60)


def test_a_host_without_threads_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    monkeypatch.setattr(early_writeback, "_STEP_BYTES", 1)
    (tmp_path / "source").write_bytes(b"data" * 1024)
    with tapfs.open(tmp_path / "source", format="raw") as source:
        convert_to_new(source, str(tmp_path / "target"), NewImage(format="raw", size=source.size))
    assert (tmp_path / "target").read_bytes() == b"data" * 1024


def test_a_copy_that_fails_leaves_no_thread(tmp_path: Path, calls: list[threading.Thread]) -> None:
    (tmp_path / "source").write_bytes(os.urandom(8 * MIB))

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    new = NewImage(format="raw", size=8 * MIB)
    with tapfs.open(tmp_path / "source", format="raw") as source, pytest.raises(KeyboardInterrupt):
        convert_to_new(source, str(tmp_path / "target"), new, progress=stop)
    assert _threads() == []
    assert not (tmp_path / "target").exists()
