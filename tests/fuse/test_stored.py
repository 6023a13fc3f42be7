"""Mounts in the foreground under a service manager, which keeps their descriptors: whatever is killed, they go on."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tapfs.serving.processes import process_start
from tests.fuse.conftest import Mounts, make_file_system, wait_for

native = pytest.mark.parametrize("mounts", ["native"], indirect=True)

#: Has a program begin with the descriptors from 3 on that it is told, as systemd does.
_HANDED_OVER = """
import os, sys
names, numbers, *command = sys.argv[1:]
descriptors = [os.dup2(int(number), 100 + at) for at, number in enumerate(numbers.split(",") if numbers else [])]
for at, descriptor in enumerate(descriptors, 3):
    os.dup2(descriptor, at)
    os.close(descriptor)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(descriptors)), LISTEN_FDNAMES=names)
os.execv(command[0], command)
"""


#: Writes the disk that it is told, and reads it again when somebody says so.
_USER = """
import os, sys
disk = os.open(sys.argv[1], os.O_RDWR)
os.pwrite(disk, b"w" * 4096, 1 << 20)
print("written", flush=True)
sys.stdin.readline()
os.posix_fadvise(disk, 0, 0, os.POSIX_FADV_DONTNEED)
assert os.pread(disk, 4096, 1 << 20) == b"w" * 4096
assert os.pwrite(disk, b"again", 0) == 5
print("read", flush=True)
"""


class Manager:
    """A service manager's socket for notifications, and its store."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(60)
        self.store: list[tuple[str, int]] = []

    def take(self) -> str:
        """The next message; what it is to keep is kept."""
        message, descriptors, _, _ = socket.recv_fds(self._socket, 4096, 64)
        first, _, rest = message.decode().partition("\n")
        name = rest.removeprefix("FDNAME=")
        if first == "FDSTORE=1":
            self.store += [(name, descriptor) for descriptor in descriptors]
        elif first == "FDSTOREREMOVE=1":
            self.forget(name)
        return first

    def await_stored(self, *further: str) -> None:
        """Wait for the word that it serves, and for a connection in the store, with what else there is to be."""
        ready = False
        while not (ready and {name for name, _ in self.store} == {"tapfs-mount", "tapfs-connection", *further}):
            ready |= self.take() == "READY=1"

    def forget(self, name: str) -> None:
        for descriptor in (kept for known, kept in self.store if known == name):
            os.close(descriptor)
        self.store = [(known, kept) for known, kept in self.store if known != name]

    def start(self, mounts: Mounts, *words: object) -> subprocess.Popen[bytes]:
        """Start a command with what is in the store."""
        names = ":".join(name for name, _ in self.store)
        descriptors = [descriptor for _, descriptor in self.store]
        program = [sys.executable, "-c", _HANDED_OVER, names, ",".join(map(str, descriptors)), *mounts.command]
        return subprocess.Popen([*program, *map(str, words)], env=mounts.environment, pass_fds=descriptors)

    def close(self) -> None:
        for name in {name for name, _ in self.store}:
            self.forget(name)
        self._socket.close()


def require_nothing_left(mounts: Mounts, manager: Manager, image: Path) -> None:
    """The store lets go, no mount and no process is left, and the image is clean."""
    while manager.store:
        manager.take()
    assert mounts.left_behind() == []
    assert mounts.run("check", image).code == 0


@pytest.fixture
def manager(mounts: Mounts, tmp_path: Path) -> Iterator[Manager]:
    path = tmp_path / "notify"
    made = Manager(path)
    mounts.environment["NOTIFY_SOCKET"] = str(path)
    yield made
    made.close()


@native
@pytest.mark.parametrize(("option", "further"), [("--rw", []), ("--temp", ["tapfs-scratch"])])
def test_whatever_is_killed_it_goes_on(
    mounts: Mounts, manager: Manager, tmp_path: Path, option: str, further: list[str]
) -> None:
    image, directory = tmp_path / "image", mounts.directory()
    assert mounts.run("create", "-f", "qcow2", image, "8M").code == 0
    words = ("mount", "--foreground", option, image, directory)
    with manager.start(mounts, *words) as first:
        manager.await_stored(*further)
        # A process of its own has the disk open: whoever starts a program closes what it has open, which waits.
        user = subprocess.Popen(
            [sys.executable, "-c", _USER, directory / "disk"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert user.stdin is not None
        assert user.stdout is not None
        assert user.stdout.readline() == "written\n"
        for pid in sorted(mounts.all_processes(), key=lambda pid: pid != first.pid):
            os.kill(pid, signal.SIGKILL)
        first.wait()
        wait_for(lambda: not mounts.all_processes())
    user.stdin.write("read\n")
    user.stdin.flush()
    with user, manager.start(mounts, *words) as second:
        manager.await_stored(*further)
        assert user.stdout.readline() == "read\n"
        assert user.wait(60) == 0
        (listed,) = json.loads(mounts.run("list", "--json").out)["mounts"]
        assert (listed["alive"], listed["keeper"]) == (True, second.pid)
        mounts.umount(directory)
        assert second.wait(60) == 0
    require_nothing_left(mounts, manager, image)


@native
def test_a_killed_server_is_a_pause_in_the_foreground_too(mounts: Mounts, sample: Path) -> None:
    directory = mounts.directory()
    with mounts.start("mount", "--foreground", sample, directory) as keeper:
        wait_for(lambda: (directory / "disk").exists() and len(list(mounts.runtime.glob("*.json"))) == 1)
        (listed,) = json.loads(mounts.run("list", "--json").out)["mounts"]
        assert listed["keeper"] == keeper.pid
        os.kill(listed["pid"], signal.SIGKILL)
        wait_for(lambda: process_start(listed["pid"]) is None)
        assert (directory / "disk").read_bytes() == sample.read_bytes()
        mounts.umount(directory)
        assert keeper.wait(60) == 0


@native
@pytest.mark.usefixtures("root")
def test_files_whose_program_was_killed_too_are_shown_again(
    mounts: Mounts, manager: Manager, tmp_path: Path, content: Path
) -> None:
    """The program had the disk open, and ends when somebody answers for that; a server ended with it, and well."""
    image, directory = tmp_path / "image", mounts.directory()
    make_file_system(tmp_path / "raw", "ntfs", content)
    assert mounts.run("convert", "-O", "qcow2", tmp_path / "raw", image).code == 0
    words = ("mount", "--foreground", "--files", "--rw", image, directory)
    with manager.start(mounts, *words) as first:
        manager.await_stored()
        with (directory / "new").open("w") as file:
            file.write("written")
            file.flush()
            os.fsync(file.fileno())
        for pid in sorted(mounts.all_processes(), key=lambda pid: pid != first.pid):
            os.kill(pid, signal.SIGKILL)
        first.wait()
    with manager.start(mounts, *words) as second:
        manager.await_stored()
        assert (directory / "new").read_text() == "written"
        mounts.umount(directory)
        assert second.wait(60) == 0
    require_nothing_left(mounts, manager, image)
