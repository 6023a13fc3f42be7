"""A mount looks at its image in a sandbox: a driver that is evil on purpose gets nowhere in it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.evil_driver import ATTEMPTS, EvilDriver
from tests.fuse.conftest import Mounts, make_file_system, wait_for
from tests.unit.remote.cut_line import nbd_served


@pytest.fixture
def evil(tmp_path: Path) -> Iterator[EvilDriver]:
    made = EvilDriver(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("options", [[], ["--rw"], ["--temp"]], ids=["ro", "rw", "temp"])
def test_an_evil_driver_gets_nowhere(mounts: Mounts, evil: EvilDriver, options: list[str]) -> None:
    mounts.environment |= evil.environment
    directory = mounts.mount(evil.image, *options)
    assert (directory / "disk").read_bytes() == evil.image.read_bytes()
    require_nothing_done(mounts, evil, directory)


@pytest.mark.parametrize("mounts", ["native"], indirect=True)
@pytest.mark.usefixtures("root", "no_new_loop_device")
@pytest.mark.parametrize("kind", ["ext4", "ntfs"])
def test_so_it_is_where_the_files_are_shown(mounts: Mounts, evil: EvilDriver, content: Path, kind: str) -> None:
    """The kernel, or a program, has them mounted by another process."""
    mounts.environment |= evil.environment
    make_file_system(evil.image, kind, content)
    directory = mounts.mount(evil.image, "-f", "evil", "--files", "--rw")
    (directory / "new").write_text("written")
    require_nothing_done(mounts, evil, directory)


def test_so_it_is_of_a_disk_that_is_written_elsewhere(mounts: Mounts, evil: EvilDriver) -> None:
    mounts.environment |= evil.environment
    with nbd_served(evil.image) as path:
        directory = mounts.mount("--rw", f"nbd+unix:///disk?socket={path}")
        with (directory / "disk").open("r+b") as disk:
            disk.seek(1000)
            disk.write(b"written")
            disk.flush()
            os.fsync(disk.fileno())
            assert evil.image.read_bytes()[1000:1007] == b"written"
        require_nothing_done(mounts, evil, directory)


def require_nothing_done(mounts: Mounts, evil: EvilDriver, directory: Path) -> None:
    """The driver has tried everything in the process that serves, and has done nothing. Unmounts."""
    listed = json.loads(mounts.run("list", "--json").out)["mounts"]
    assert [each["sandbox"] for each in listed] == ["on"]
    mounts.umount(directory)
    # The process that is to serve is forked after the image was opened, and makes none any more.
    assert evil.done(listed[0]["pid"]) == {"map": set()}, evil.results()
    assert set(evil.results(listed[0]["pid"])["map"]) == ATTEMPTS
    assert all(each <= {"fork"} for each in evil.done().values()), evil.results()


def test_without_a_sandbox_it_gets_everywhere(mounts: Mounts, evil: EvilDriver) -> None:
    mounts.environment |= evil.environment
    directory = mounts.mount(evil.image, "--no-sandbox")
    assert (directory / "disk").read_bytes() == evil.image.read_bytes()
    listed = mounts.run("list").out
    assert "no sandbox" in listed
    pid = json.loads(mounts.run("list", "--json").out)["mounts"][0]["pid"]
    mounts.umount(directory)
    assert evil.done(pid) == {"map": ATTEMPTS}, evil.results()


def test_the_process_outside_ends_with_the_one_that_serves(mounts: Mounts, evil: EvilDriver) -> None:
    directory = mounts.mount(evil.image, "-f", "raw")
    pid = json.loads(mounts.run("list", "--json").out)["mounts"][0]["pid"]
    assert len(mounts.all_processes()) == 3  # with the keeper
    assert mounts.processes() == [pid]
    mounts.kill(pid)
    wait_for(lambda: not mounts.all_processes())
    assert mounts.run("umount", directory).code == 0


@pytest.mark.parametrize("mounts", ["native"], indirect=True)
@pytest.mark.usefixtures("root", "no_new_loop_device")
def test_files_whose_process_outside_was_killed_stay_listed(mounts: Mounts, flat: Path) -> None:
    """The server cannot unmount them at its end; whoever looks for them then finds them."""
    directory = mounts.mount(flat, "--files")
    (listed,) = json.loads(mounts.run("list", "--json").out)["mounts"]
    for pid in mounts.all_processes():
        if b"tapfs.fuse.outside" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
    refused = mounts.run("umount", directory)
    assert (refused.code, "is gone" in refused.err) == (10, True)
    assert (directory / "text").exists()
    os.kill(listed["pid"], signal.SIGTERM)
    wait_for(lambda: not mounts.all_processes())
    assert "had died; cleaned up" in mounts.run("umount", directory).err
    assert mounts.left_behind() == []
