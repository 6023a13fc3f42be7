"""Mounts of files whose processes are killed, at whatever moment: what is left is found, and one command clears it."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tapfs.errors import ErrorKind, ImageError
from tapfs.fuse import unmounting
from tapfs.fuse.files.loop_device import loop_device
from tapfs.serving.processes import process_start
from tests.fuse.conftest import MIB, Mounts, make_file_system, parent_of, somebody, wait_for

pytestmark = pytest.mark.usefixtures("root", "no_new_loop_device")

native = pytest.mark.parametrize("mounts", ["native"], indirect=True)


@pytest.mark.parametrize("writing", [False, True])
def test_killed(mounts: Mounts, flat: Path, writing: bool) -> None:  # noqa: FBT001
    directory = mounts.mount(flat, "--files", *(["--rw", "-f", "raw"] if writing else []))
    (pid,) = mounts.processes()
    descriptor = None
    if writing:
        (directory / "unwritten").write_bytes(b"x" * MIB)
        descriptor = os.open(directory / "text", os.O_RDONLY)
    mounts.kill(pid)
    wait_for(lambda: not mounts.processes())
    (entry,) = json.loads(mounts.run("list", "--json").out)["mounts"]
    assert not entry["alive"]
    again = mounts.run("mount", "--files", flat, directory)
    assert again.code in (15, 18)
    cleaned = mounts.run("umount", directory)
    assert cleaned.code == 0
    assert f"process {pid}, which served it, had died; cleaned up" in cleaned.err
    assert mounts.left_behind() == []
    if descriptor is not None:
        os.close(descriptor)
    mounts.umount(mounts.mount(flat, "--files", "--temp"))


def kill(*pids: int) -> None:
    """Kill those that still run."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def hidden_disk(mounts: Mounts) -> Path:
    """The directory on which a process mounts the disk of the files that it is to show, once it has.

    It is there for a moment only. Who sleeps until the kernel tells of a mount runs then, on a busy machine, too; who
    looks all the time has used up its share.
    """
    patience = time.monotonic() + 60
    with Path("/proc/self/mounts").open("rb") as table:
        changes = select.poll()
        changes.register(table, select.POLLPRI)
        while not (disks := list(mounts.runtime.glob("*.disk/disk"))):
            assert time.monotonic() < patience, "no hidden disk was mounted"
            changes.poll(1000)
    (disk,) = disks
    return disk.parent


def servers_of(hidden: Path) -> tuple[int, int]:
    """The processes that a hidden disk goes with: its keeper, and the one that serves it."""
    entry = json.loads(hidden.with_suffix(".json").read_text())
    return entry["pid"], entry["server"]


def process_outside(mounts: Mounts) -> int:
    """The process that mounts, outside of the sandbox."""
    words = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in mounts.all_processes()}
    outside = {pid for pid, said in words.items() if b"tapfs.fuse.outside" in said}
    (found,) = [pid for pid in outside if parent_of(pid) not in outside]  # its children do what is asked
    return found


class Clock:
    """The module `time` for somebody who waits, with something that happens when he does."""

    monotonic = staticmethod(time.monotonic)

    def __init__(self, happens: Callable[[], None]) -> None:
        self.happens = happens

    def sleep(self, seconds: float) -> None:
        self.happens()
        time.sleep(seconds)


@contextmanager
def stopped_helper(mounts: Mounts, image: Path, directory: Path) -> Generator[tuple[Path, int, Callable[[], None]]]:
    """A mounting whose helper, the process outside, is stopped before it mounts the files.

    The hidden disk, the helper, and what kills all other processes.
    """
    with mounts.start("mount", "--files", image, directory) as command:

        def kill_others() -> None:
            kill(command.pid, *servers)
            wait_for(lambda: not any(map(process_start, servers)))

        hidden = hidden_disk(mounts)
        servers = servers_of(hidden)
        os.kill(servers[1], signal.SIGSTOP)  # who asks for the mounting
        helper = process_outside(mounts)
        os.kill(helper, signal.SIGSTOP)
        os.kill(servers[1], signal.SIGCONT)
        assert str(directory) not in mounts.mounted()
        try:
            yield hidden, helper, kill_others
        finally:
            kill(*mounts.all_processes())


def test_killed_while_mounting(mounts: Mounts, flat: Path) -> None:
    """At whatever moment: the next command finds nothing, or cleans up what is there."""
    directory = mounts.directory()
    for delay in range(150, 600, 75):
        with mounts.start("mount", "--files", flat, directory) as command:
            time.sleep(delay / 1000)
            kill(*(pid for pid in mounts.processes() if pid != command.pid))
            command.communicate(timeout=60)
        assert mounts.run("umount", directory).code in (0, 17)
        wait_for(lambda: not mounts.processes())
        assert mounts.left_behind() == []


@pytest.mark.parametrize(
    ("mounts", "kind"),
    [("native", "ext4"), ("pyfuse3", "ext4"), ("native", "ntfs"), ("native", "iso9660")],
    indirect=["mounts"],
)
@pytest.mark.parametrize("moment", ["files appear", "files appear, all", "disk goes"])
def test_killed_at_the_end_of_mounting(mounts: Mounts, tmp_path: Path, content: Path, kind: str, moment: str) -> None:
    """When it is not noted yet what was mounted, by the kernel or by a FUSE file system; and as soon as it is."""
    image, directory = tmp_path / "image.raw", mounts.directory()
    make_file_system(image, kind, content)
    with mounts.start("mount", "--files", image, directory) as command:
        hidden = hidden_disk(mounts)
        servers = servers_of(hidden)
        if moment == "disk goes":
            wait_for(lambda: not hidden.exists(), step=0)
        else:
            wait_for(lambda: str(directory) in mounts.mounted(), step=0)
        kill(command.pid, *servers)
        if moment == "files appear, all":
            kill(*mounts.processes())
    (entry,) = json.loads(mounts.run("list", "--json").out)["mounts"]
    assert (entry["alive"], entry["mountpoint"]) == (False, str(directory))
    assert "had died; cleaned up" in mounts.run("umount", directory).err
    wait_for(lambda: not mounts.processes())
    assert mounts.left_behind() == []


def test_command_clears_away(mounts: Mounts, flat: Path) -> None:
    """What waits for a server that is killed leaves nothing of it."""
    directory = mounts.directory()
    with mounts.start("mount", "--files", flat, directory) as command:
        hidden = hidden_disk(mounts)
        wait_for(lambda: str(directory) in mounts.mounted(), step=0)
        kill(servers_of(hidden)[1])
        error = f"tapfs: error: {directory}: the serving process ended early (SIGKILL)\n"
        assert command.communicate(timeout=60) == ("", error)
    assert command.returncode == 10
    wait_for(lambda: not mounts.processes())
    assert mounts.left_behind() == []


@pytest.mark.parametrize("mounts", ["native", "passthrough"], indirect=True)
def test_mounted_after_the_kill(mounts: Mounts, flat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has the disk open already is waited for: with passthrough the kernel can still read it, and he mounts."""
    directory = mounts.directory()
    monkeypatch.setenv("TAPFS_RUNTIME_DIR", str(mounts.runtime))
    with stopped_helper(mounts, flat, directory) as (hidden, helper, kill_others), ExitStack() as opened:
        disk = opened.enter_context((hidden / "disk").open("rb"))
        shown = loop_device(disk.fileno(), "disk", offset=0, size=flat.stat().st_size, writable=False, name="x")
        device = opened.enter_context(shown)
        disk.close()
        kill_others()  # first: who waits for the helper would clean up
        kill(helper)
        (entry,) = json.loads(mounts.run("list", "--json").out)["mounts"]
        assert (entry["alive"], entry["mountpoint"]) == (False, str(directory))

        def mount_it() -> None:
            clock.happens = lambda: None
            mounted = subprocess.run(["mount", "-o", "ro,noload", device, directory], check=False, capture_output=True)
            assert (mounted.returncode == 0) == (mounts.engine == "passthrough")
            opened.close()

        clock = Clock(mount_it)
        monkeypatch.setattr(unmounting, "time", clock)
        said = unmounting.unmount_image(str(directory), force=False)
        assert said is not None
        assert "had died; cleaned up" in said
    assert mounts.left_behind() == []


@native
def test_server_killed_before_the_mounting(mounts: Mounts, flat: Path) -> None:
    """The helper that begins after the cleaning up finds nothing to mount."""
    directory = mounts.directory()
    with stopped_helper(mounts, flat, directory) as (_, helper, kill_others):
        kill_others()
        assert json.loads(mounts.run("list", "--json").out)["mounts"] == []
        assert mounts.run("umount", directory).code == 17
        os.kill(helper, signal.SIGCONT)
        wait_for(lambda: not mounts.all_processes())
    assert mounts.left_behind() == []


@native
def test_disk_stays_in_use(mounts: Mounts, flat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What may still be mounted is not forgotten, and whoever is to blame is named."""
    directory = mounts.directory()
    monkeypatch.setenv("TAPFS_RUNTIME_DIR", str(mounts.runtime))
    monkeypatch.setattr(unmounting, "_PATIENCE_SECONDS", 0)
    with stopped_helper(mounts, flat, directory) as (hidden, helper, kill_others), somebody(cwd=hidden) as user:
        kill_others()  # first: who waits for the helper would clean up
        kill(helper)
        with pytest.raises(ImageError, match=rf"still used by process {user.pid} \(sleep\)") as caught:
            unmounting.unmount_image(str(directory), force=False)
        assert caught.value.kind is ErrorKind.LOCKED
        assert "(dead)" in mounts.run("list").out
    assert mounts.run("umount", directory).code == 0
    assert mounts.left_behind() == []


@native
@pytest.mark.parametrize("options", [[], ["--files"]])
def test_killed_and_covered(mounts: Mounts, flat: Path, options: list[str]) -> None:
    """Another's mount over that of a dead process is not touched, nor is what lies below it forgotten."""
    directory = mounts.mount(flat, *options)
    subprocess.run(["mount", "-t", "tmpfs", "above", directory], check=True)
    mounts.kill(*mounts.processes())
    wait_for(lambda: not mounts.processes())
    for command in (["umount", directory], ["umount", "--all"]):
        failed = mounts.run(*command)
        assert (failed.code, "another file system is mounted over it" in failed.err) == (15, True)
    assert mounts.mounted() == [str(directory)] * 2
    subprocess.run(["umount", directory], check=True)
    assert mounts.run("umount", directory).code == 0
    assert mounts.left_behind() == []


def test_interrupted_while_mounting(mounts: Mounts, flat: Path) -> None:
    directory = mounts.directory()
    for delay in range(0, 500, 50):
        with mounts.start("mount", "--files", flat, directory) as command:
            time.sleep(delay / 1000)
            command.send_signal(signal.SIGINT)
            command.communicate(timeout=60)
        if command.returncode == 0:
            mounts.umount(directory)
        wait_for(lambda: not mounts.left_behind())
        assert mounts.left_behind() == []
