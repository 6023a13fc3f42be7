"""A mount under whose process threads, descriptors or memory run out: nothing acknowledged is lost, nothing is left."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tapfs
from tests.conftest import Ran
from tests.fuse.conftest import Mounts, is_keeper, wait_for

#: `tapfs` that flushes often and keeps no idle thread; once a file exists, its process gets no new thread.
_WITHOUT_THREADS = """
import os, sys, threading
import trio._core._thread_cache
from tapfs.serving import periodic_flush
limit, *words = sys.argv[1:]
trio._core._thread_cache.IDLE_TIMEOUT = 0.001
periodic_flush._FLUSH_SECONDS = 0.05
start = threading.Thread.start
def limited(self):
    if os.path.exists(limit):
        raise RuntimeError("can't start new thread")
    start(self)
threading.Thread.start = limited
from tapfs.cli.main import main
sys.exit(main(words))
"""

#: `tapfs` whose process may have so many threads beside the first at a time.
_SOME_THREADS = """
import sys, threading
most, *words = sys.argv[1:]
start = threading.Thread.start
def limited(self):
    if threading.active_count() > int(most):
        raise RuntimeError("can't start new thread")
    start(self)
threading.Thread.start = limited
from tapfs.cli.main import main
sys.exit(main(words))
"""

#: `tapfs` whose process cannot unmount at its end.
_WITHOUT_UNMOUNT = """
import sys
from tapfs.fuse import session
def unmount(*_, **__):
    raise RuntimeError("can't start new thread")
session.Outside.unmount = unmount
from tapfs.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def created(mounts: Mounts, path: Path) -> Path:
    assert mounts.run("create", "-f", "qcow", path, "16M") == Ran(0, "", "")
    return path


def written(disk: Path, data: bytes) -> None:
    """Write without a flush: closing a file flushes it."""
    script = "import os, sys; os.pwrite(os.open(sys.argv[1], os.O_RDWR), sys.argv[2].encode(), 4096); os._exit(0)"
    subprocess.run([sys.executable, "-c", script, str(disk), data.decode()], check=True)


def in_image(image: Path, length: int) -> bytes:
    with tapfs.open(str(image), format="qcow", shared=True) as again:
        return again.read(4096, length)


@pytest.fixture
def plain(mounts: Mounts) -> list[str]:
    """The command as it is without a fault."""
    return mounts.command


def test_flushes_unmounts_and_closes_without_a_new_thread(
    mounts: Mounts, plain: list[str], tmp_path: Path, sample: Path
) -> None:
    image = created(mounts, tmp_path / "image.qcow")
    limit = tmp_path / "limit"
    mounts.command = [sys.executable, "-c", _WITHOUT_THREADS, str(limit)]
    directory = mounts.mount(image, "-f", "qcow", "--rw")
    other = mounts.mount(sample)
    limit.touch()
    mounts.command = plain
    with (directory / "disk").open("r+b", buffering=0) as disk:
        os.pwrite(disk.fileno(), b"acknowledged", 4096)
        wait_for(lambda: in_image(image, 12) == b"acknowledged", patience=20)  # the background flush
        assert in_image(image, 12) == b"acknowledged"
        os.fsync(disk.fileno())
        assert os.pread(disk.fileno(), 12, 4096) == b"acknowledged"
    assert json.loads((directory / "info.json").read_text())["format"] == "qcow"
    assert (other / "disk").read_bytes() == sample.read_bytes()
    written(directory / "disk", b"at the end ")
    mounts.umount(directory)
    mounts.umount(other)
    assert in_image(image, 11) == b"at the end "


@pytest.mark.parametrize("ending", [signal.SIGTERM, None])
def test_the_image_is_closed_although_nothing_can_be_unmounted(
    mounts: Mounts, plain: list[str], tmp_path: Path, ending: signal.Signals | None
) -> None:
    image = created(mounts, tmp_path / "image.qcow")
    mounts.command = [sys.executable, "-c", _WITHOUT_UNMOUNT]
    directory = mounts.mount(image, "-f", "qcow", "--rw")
    mounts.command = plain
    written(directory / "disk", b"acknowledged")
    (pid,) = mounts.processes()
    if ending is None:
        refused = mounts.run("umount", directory)
        assert refused.code == 10
        assert "no more threads can be started" in refused.err
        assert mounts.processes() == [pid]  # it stays mounted
        assert (directory / "disk").exists()
    os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not mounts.processes())
    assert in_image(image, 12) == b"acknowledged"
    assert mounts.run("check", image).code == 0
    cleaned = mounts.run("umount", directory)
    assert cleaned == Ran(0, "", f"tapfs: {directory}: the process that served it had died; cleaned up\n")


@pytest.mark.parametrize("threads", range(8))
@pytest.mark.parametrize("options", [[], ["--foreground"]])
def test_too_few_threads_to_mount(mounts: Mounts, sample: Path, threads: int, options: list[str]) -> None:
    """With one the mount gets as far as to look at itself, in a process that trio starts from a thread."""
    mounts.command = [sys.executable, "-c", _SOME_THREADS, str(threads)]
    needed = {"native": 8, "pyfuse3": 2}[mounts.engine]
    directory = mounts.directory()
    if threads >= needed:
        if not options:
            assert mounts.run("mount", sample, directory) == Ran(0, "", "")
            assert mounts.run("umount", directory) == Ran(0, "", "")
        return
    failed = mounts.run("mount", *options, sample, directory)
    assert failed.code == 10
    last = failed.err.splitlines()[-1]
    assert last.startswith("tapfs: error: ")
    assert "no more threads can be started; raise the limit of processes and threads" in last
    assert "internal error" not in failed.err
    assert mounts.left_behind() == []


@pytest.mark.parametrize("mounts", ["auto"], indirect=True)
def test_auto_mounts_with_fewer_threads(mounts: Mounts, sample: Path) -> None:
    mounts.command = [sys.executable, "-c", _SOME_THREADS, "3"]
    directory = mounts.mount(sample)
    (entry,) = json.loads(mounts.run("list", "--json").out)["mounts"]
    assert entry["engine"] == "pyfuse3"
    mounts.umount(directory)


@pytest.mark.parametrize("limit", range(6, 17))
def test_too_few_descriptors_to_mount(mounts: Mounts, sample: Path, limit: int) -> None:
    directory = mounts.directory()
    done = subprocess.run(
        [*mounts.command, "mount", "--engine", mounts.engine, sample, directory],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        env=mounts.environment,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)),
    )
    assert done.returncode == 10
    assert done.stderr.count("\n") == 1
    assert "Too many open files" in done.stderr
    assert "internal error" not in done.stderr
    assert mounts.left_behind() == []


# Status requests


def connected(mounts: Mounts) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    (path,) = mounts.runtime.glob("*.socket")
    connection.connect(str(path))
    return connection


def asked(connection: socket.socket, **request: object) -> dict[str, Any]:
    connection.sendall(json.dumps(request).encode() + b"\n")
    with connection.makefile() as answers:
        answer: dict[str, Any] = json.loads(answers.readline())
    return answer


def test_a_status_request_at_the_end(mounts: Mounts, sample: Path) -> None:
    """The image is closed when an unmount is answered. Whoever asks then is answered, and ends nothing."""
    directory = mounts.directory()
    process = mounts.foreground(sample, directory)
    # The mount is looked at by a process that ends, of the one outside of the sandbox.
    wait_for(lambda: mounts.served_by(process.pid) and len(mounts.all_processes()) == 2 + is_keeper(process.pid))
    with connected(mounts) as early, connected(mounts) as unmounting:
        before = asked(early, command="status")
        assert before["ok"] is True
        assert asked(unmounting, command="umount") == {"ok": True, "error": None}
        assert asked(early, command="status") == before
        assert asked(early, command="nonsense")["ok"] is False
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 0


# Signals around the fork

#: `tapfs` that gets a signal in the parent or in the child, as the fork returns there.
_SIGNALLED = """
import os, signal, sys
where, number, *words = sys.argv[1:]
fork = os.fork
def forked():
    child = fork()
    if (child == 0) == (where == "child"):
        os.kill(os.getpid(), int(number))
    return child
os.fork = forked
from tapfs.cli.main import main
sys.exit(main(words))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("where", ["parent", "child"])
def test_a_signal_as_the_server_is_forked(mounts: Mounts, sample: Path, where: str, number: int) -> None:
    mounts.command = [sys.executable, "-c", _SIGNALLED, where, str(int(number))]
    done = mounts.run("mount", sample, mounts.directory())
    assert done.err.count("\n") == 1
    assert "internal error" not in done.err
    if where == "parent":
        assert done.code == 128 + number
    else:
        assert done.code == 10
        assert "a signal ended it before it answered" in done.err
    wait_for(lambda: not mounts.processes())
    assert mounts.left_behind() == []
