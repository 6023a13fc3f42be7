"""A guest's disk under the unit of `tapfs blktapctrl`: kills, a restart, a snapshot, a commit and a mirror under load.

Run by `python -m tests.distribution.guests_disk` in a root whose systemd has booted. Xen is a simulated machine.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import trio

import tapfs
from tapfs.xen.host import MACHINE_VARIABLE, find_host
from tapfs.xen.toolstack.attach import attach_and_wait
from tapfs.xen.xenstore.client import connect
from tests.xen.load import Load
from tests.xen.machine import Machine
from tests.xen.supervising import GUEST, SIZE, another_process, detach, disk, eventually, guest_disk, pid_of
from tests.xen.xenstored import Xenstored

UNIT = "tapfs-blktapctrl.service"
_DISK = ("--domain", "guest", "--vdev", "xvda")


async def _run(*words: str) -> None:
    await trio.run_process(words)


async def _tapfs(*words: str) -> None:
    await _run(sys.executable, "-m", "tapfs.cli", *words)


def _is_active() -> bool:
    return subprocess.run(["systemctl", "is-active", "-q", UNIT], check=False).returncode == 0


async def _more(load: Load) -> None:
    """Wait until twenty more writes have been answered, or one has failed."""
    wanted = load.count + 20
    await eventually(lambda: load.failed or load.count >= wanted)
    load.check()


async def _use(machine: Machine, xenstored: Xenstored, image: Path) -> bytes:
    """What the disk holds in the end."""
    xenstored.introduce(GUEST, "guest")
    await _run("systemctl", "start", UNIT)
    device = disk()
    async with connect(find_host()) as store:
        await attach_and_wait(store, device, params=f"tap:qcow:{image}", mode="w", options={"nice": "-5"})
        async with guest_disk(machine, device) as driver:
            async with Load(driver.frontend, SIZE) as load:
                await _more(load)
                pid = await pid_of(store, device)
                assert os.getpriority(os.PRIO_PROCESS, pid) == -5
                os.kill(pid, signal.SIGKILL)
                await another_process(store, device, pid)
                await _more(load)

                pid = await pid_of(store, device)
                await _run("systemctl", "kill", "--signal=KILL", "--kill-who=main", UNIT)
                await eventually(_is_active)
                await _more(load)
                assert await pid_of(store, device) == pid
                for words in (["restart"], ["kill", "--signal=KILL", "--kill-who=all"]):
                    pid = await pid_of(store, device)
                    await _run("systemctl", *words, UNIT)
                    await another_process(store, device, pid)
                    await _more(load)

                await _tapfs("swap", *_DISK, f"{image}.kept")
                await _more(load)
                await _tapfs("commit", *_DISK)
                await _tapfs("mirror", *_DISK, "-O", "qcow2", "--pivot", f"{image}.mirror")
                await _more(load)
            await detach(store, driver)
        await _run("systemctl", "stop", UNIT)
    return load.expected()


async def _main(folder: Path, image: Path) -> None:
    with Machine(folder) as machine:
        async with trio.open_nursery() as nursery:
            xenstored = Xenstored(folder)
            await nursery.start(xenstored.run)
            expected = await _use(machine, xenstored, image)
            nursery.cancel_scope.cancel()
    with tapfs.open(f"{image}.mirror") as mirror:
        assert mirror.read(0, SIZE) == expected


if __name__ == "__main__":
    theirs = Path("/srv/guest.qcow")
    tapfs.create(str(theirs), "qcow", SIZE)
    # It is somebody else's, and nobody else's to read.
    os.chown(theirs, 1000, 1000)
    theirs.chmod(0o600)
    trio.run(_main, Path(os.environ[MACHINE_VARIABLE]), theirs)
