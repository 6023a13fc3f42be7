"""The host's disk fails or loses writes for a while, under images that are in use.

The images lie on ext4 and on XFS, on dm-flakey. They are written through block devices and FUSE mounts. When the disk
works again the file system is mounted anew, which replays its journal. Then each image has to check clean, to hold what
was acknowledged by a flush, and to take writes.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import threading
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tapfs.errors import ImageError
from tapfs.ublk.attaching import ask, device_number
from tests.laboratory.commands import PATIENCE, attempt_tapfs, run, say, wait_until
from tests.laboratory.commands import tapfs as command
from tests.laboratory.scenario import scenario
from tests.ublk.scenarios.block_devices import BlockDevices
from tests.ublk.scenarios.device_mapper import (
    DEVICE,
    FAILS_WRITES,
    FILE_SYSTEMS,
    LOSES_WRITES,
    MOUNT,
    WORKS,
    behave,
    empty_folder,
    flaky,
    loop,
    mounted,
    new_file,
)
from tests.ublk.scenarios.noted_writes import Kind, Written

SIZE = 48 << 20
KINDS = (Kind("qcow2"), Kind("vmdk"), Kind("qcow2", mounted=True), Kind("vdi", mounted=True))
#: The exit code of an error of the kind not_found.
NOT_FOUND = 17
WRITES, TURNS = 6, 3
#: Writes that fail at once: many more than threads that serve them.
MANY = 40


@dataclass
class Writer:
    """A thread that writes and makes it durable, and what came of it."""

    written: Written
    disk: int
    choice: random.Random
    error: OSError | None = None

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def _write(self) -> None:
        try:
            self.written.write(self.disk, self.choice, MANY)
        except OSError as error:
            self.error = error

    def await_end(self) -> None:
        """Wait until every write is answered."""
        wait_until("an answer to all writes", lambda: not self._thread.is_alive())


@scenario(90)
def users_wait_until_the_disk_works(host: BlockDevices) -> str:
    """--wait-on errors: many writes fail at once, and one resume has all of them done; a detach --force ends them."""
    with empty_folder(), loop(new_file("data", SIZE)) as lower, flaky(lower, SIZE):
        device = host.attach("-f", "raw", "--direct", "--wait-on", "errors", DEVICE)
        written, choice = Written(), random.Random(1)
        disk = os.open(device, os.O_RDWR)
        written.write(disk, choice, WRITES)
        behave(lower, SIZE, FAILS_WRITES)
        writer = Writer(written, disk, choice)
        _wait_until_they_wait(device)
        command("resume", "--ublk", device)  # in vain
        behave(lower, SIZE, WORKS)
        command("resume", "--ublk", device)
        writer.await_end()
        assert writer.error is None
        assert written.acknowledged == written.count
        behave(lower, SIZE, FAILS_WRITES)
        writer = Writer(written, disk, choice)
        _wait_until_they_wait(device)
        refused = attempt_tapfs("detach", "--ublk", device)
        assert refused.returncode != 0
        assert "wait" in refused.stdout
        # In a program of its own: a fork would have the device open, which goes when the last user closes it.
        detaching = subprocess.Popen(["tapfs", "detach", "--ublk", device, "--force"])
        writer.await_end()
        assert writer.error is not None
        assert writer.error.errno == errno.EIO
        os.close(disk)
        assert detaching.wait(60 * PATIENCE) != 0  # something is lost
        assert not host.leftovers()
        behave(lower, SIZE, WORKS)
        written.look(Path(DEVICE), Kind("raw"), written.acknowledged)
    return f"{written.count} writes"


@scenario(180)
def a_device_whose_image_is_gone_is_taken_away_by_force(host: BlockDevices) -> str:
    """Its process is killed, and the next ones find no image: the device goes, and does not come again."""
    with empty_folder():
        image = new_file("disk", 1 << 20)
        device = host.attach("-f", "raw", str(image))
        image.rename(image.with_name("away"))
        os.kill(host.process(device), signal.SIGKILL)
        wait_until("nobody to serve it", lambda: not _is_served(device))
        assert "no process serves it now" in command("detach", "--ublk", device, statuses=[NOT_FOUND])
        # What was not flushed is lost. The command has waited 90 s for a process.
        command("detach", "--ublk", device, "--force", statuses=[NOT_FOUND], limit=150)
        image.with_name("away").rename(image)
        assert not host.leftovers()
    return ""


def _is_served(device: str) -> bool:
    try:
        ask(device_number(device), "status")
    except ImageError:
        return False
    return True


def _wait_until_they_wait(device: str) -> None:
    wait_until("writes to wait", lambda: ask(device_number(device), "status")["waiting"])


def _disk_fails(host: BlockDevices, file_system: str, how: str) -> str:
    choice, written = random.Random(f"{file_system} {how}"), {kind: Written() for kind in KINDS}
    with empty_folder(), loop(new_file("data", SIZE)) as lower, flaky(lower, SIZE):
        run(*FILE_SYSTEMS[file_system], DEVICE)
        with mounted(DEVICE, file_system), ExitStack() as stack:
            disks = {kind: stack.enter_context(_opened(host, kind)) for kind in KINDS}
            for kind, disk in disks.items():
                written[kind].write(disk, choice, WRITES)
            sure = {kind: each.acknowledged for kind, each in written.items()}
            behave(lower, SIZE, how)
            errors = [_write_until_it_fails(written[kind], disk, choice) for kind, disk in disks.items()]
            if how == FAILS_WRITES:
                assert all(errors), "a disk that fails was not noticed"
                sure = {kind: each.acknowledged for kind, each in written.items()}
        behave(lower, SIZE, WORKS)
        with mounted(DEVICE, file_system):
            for kind, each in written.items():
                each.look(Path(MOUNT, kind.name), kind, sure[kind])
                with _opened(host, kind, make=False) as disk:
                    each.write_all(disk)
                each.look(Path(MOUNT, kind.name), kind, each.acknowledged)
    return f"{sum(each.count for each in written.values())} writes, {len(list(filter(None, errors)))} disks had errors"


@contextmanager
def _opened(host: BlockDevices, kind: Kind, *, make: bool = True) -> Generator[int]:
    """The disk of an image, open for writing; the image is made unless it is there."""
    image = f"{MOUNT}/{kind.name}"
    if make:
        kind.create(image)
    with kind.disk(host, image) as path:
        disk = os.open(path, os.O_RDWR)
        try:
            yield disk
        finally:
            with suppress(OSError):  # the file of a mount is flushed by this, too
                os.close(disk)


def _write_until_it_fails(written: Written, disk: int, choice: random.Random) -> OSError | None:
    """Write and flush a few times; the error that ends it."""
    for _ in range(TURNS):
        try:
            written.write(disk, choice, WRITES)
        except OSError as error:
            say(str(error))
            return error
    return None


@scenario(120)
def writes_fail_below_ext4(host: BlockDevices) -> str:
    """Writes fail below ext4: what a flush acknowledged is there afterwards."""
    return _disk_fails(host, "ext4", FAILS_WRITES)


@scenario(120)
def writes_fail_below_xfs(host: BlockDevices) -> str:
    """Writes fail below XFS: what a flush acknowledged is there afterwards."""
    return _disk_fails(host, "xfs", FAILS_WRITES)


@scenario(120)
def writes_are_lost_below_ext4(host: BlockDevices) -> str:
    """The disk drops writes below ext4: what was acknowledged before it did is there afterwards."""
    return _disk_fails(host, "ext4", LOSES_WRITES)


@scenario(120)
def writes_are_lost_below_xfs(host: BlockDevices) -> str:
    """The disk drops writes below XFS: what was acknowledged before it did is there afterwards."""
    return _disk_fails(host, "xfs", LOSES_WRITES)
