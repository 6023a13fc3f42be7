"""Operations on a disk while a guest works on it: pause, snapshot, resize, limit, save, migrate.

A PV guest and a PVH guest have the disks of these scenarios in turn.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from multiprocessing import get_context
from pathlib import Path

import trio

from tapfs.errors import ImageError
from tapfs.xen.device import OUR_KIND, Device, parse_vdev
from tapfs.xen.toolstack.control_client import ask
from tests.laboratory.commands import PATIENCE, attempt_tapfs, digest, run, say, tapfs, wait_until
from tests.laboratory.scenario import scenario
from tests.xen.scenarios.contents import new_qcow, new_raw
from tests.xen.scenarios.dom0 import IMAGES, Dom0
from tests.xen.scenarios.guest import Guest
from tests.xen.scenarios.kill import killed_disk

PVH_GUEST = "moving"
DISK = ("--domain", "live", "--vdev", "xvda")
OWN = ("--domain", "0", "--vdev", "xvda")


@scenario(180)
def pause_and_snapshot(dom0: Dom0) -> str:
    """Writes before the snapshot are in what was kept, those after it in the disk, also after a reboot."""
    disk, kept = new_qcow("live.qcow", 32), IMAGES / "live-kept.qcow"
    kept.unlink(missing_ok=True)
    with dom0.shared_guest("live", {"xvda": f"tap:qcow:{disk}"}) as guest:
        guest.run("echo before the snapshot >/tmp/text; dd if=/tmp/text of=/dev/xvda bs=512 seek=65000 conv=sync,fsync")
        guest.start_load("xvda", 4, 12)
        tapfs("pause", *DISK)
        before = digest(disk)
        # Nothing moves while it is paused, however often the image is looked at.
        for _ in range(3):
            assert digest(disk) == before
        tapfs("resume", *DISK)
        wait_until("writes to go on", lambda: digest(disk) != before)
        tapfs("swap", *DISK, str(kept))
        frozen = digest(kept)
        guest.run("echo after the snapshot >/tmp/text; dd if=/tmp/text of=/dev/xvda bs=512 seek=65001 conv=sync,fsync")
        writes = guest.finish_load("xvda")
        assert digest(kept) == frozen, "what was kept was written after the snapshot"
        guest.reboot()
        guest.wait_for_disk("xvda")
        guest.run("dd if=/dev/xvda bs=512 skip=65001 count=1 | grep -q 'after the snapshot'")
    for image in (kept, disk):
        tapfs("check", str(image))
    for image, texts in ((kept, "before the snapshot"), (disk, "before the snapshotafter the snapshot")):
        flat = IMAGES / "flat.img"
        tapfs("convert", "-O", "raw", str(image), str(flat))
        data = flat.read_bytes()[65000 * 512 : 65002 * 512]
        assert data.replace(b"\0", b"").replace(b"\n", b"") == texts.encode(), (image, data[:32], data[512:544])
    return f"{writes} writes"


@scenario(60)
def commit_and_mirror(dom0: Dom0) -> str:
    """Under load, and a commit is killed in its middle: in the end the disk is the mirror, with every write.

    The guest is domain 0, which need not boot.
    """
    disk, kept, copy = new_qcow("back.qcow", 16), IMAGES / "back-kept.qcow", IMAGES / "mirror.qcow2"
    for path in (kept, copy, IMAGES / "back.qcow.mirrored"):
        path.unlink(missing_ok=True)
    device = dom0.attach(f"tap:qcow:{disk}", "xvda")
    words = ["disk-load", "write", device, "4", "20", "24"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as load:
        tapfs("swap", *OWN, str(kept))
        command = get_context("fork").Process(target=_cut_off_commit)
        command.start()
        wait_until("the commit to begin", lambda: _job() == "commit")
        process = dom0.disk_process(0, "xvda")
        say(f"kill -9 {process}")
        os.kill(process, signal.SIGKILL)
        wait_until("the next process", lambda: _job() == "none" and dom0.disk_process(0, "xvda") != process)
        command.join()
        assert command.exitcode == 0, "a commit that was cut off said that it was done"
        tapfs("commit", *OWN)
        assert not kept.exists()
        tapfs("mirror", *OWN, "-O", "qcow2", "--pivot", str(copy))
        output, _ = load.communicate(timeout=120 * PATIENCE)
    found = re.search(r"LOAD-OK (\d+) requests", output)
    assert found, output
    dom0.detach("xvda")
    assert disk.resolve() == copy
    tapfs("check", str(copy))
    disk.unlink()
    return f"{found[1]} writes"


def _job() -> str:
    """The job on the disk of domain 0, "none" or, while nobody serves it, "unknown"."""

    async def work() -> object:
        return (await ask(Device(OUR_KIND, 0, parse_vdev("xvda")), "job"))["job"]

    try:
        return str(trio.run(work) or "none")
    except ImageError:
        return "unknown"


def _cut_off_commit() -> None:
    """A commit that takes far longer than the disk's process has to live."""
    raise SystemExit(attempt_tapfs("commit", *OWN, "--rate-limit", "16k").returncode == 0)


@scenario(180)
def resize_and_limits(dom0: Dom0) -> str:
    """The guest sees a new size at once, under load, and can write to the end; then its rate is limited, and freed.

    At last its host is full: it waits, and goes on without an error.
    """
    place = IMAGES / "little-room"
    place.mkdir(exist_ok=True)
    run("mount", "-t", "tmpfs", "-o", "size=28m", "tmpfs", str(place))
    try:
        return _resize_and_limits(dom0, place)
    finally:
        run("umount", "-l", str(place))


def _resize_and_limits(dom0: Dom0, place: Path) -> str:
    image = new_raw(f"{place.name}/grow.img", 16)
    with dom0.shared_guest("live", {"xvda": f"tap:aio:{image}"}) as guest:
        guest.start_load("xvda", 4, 6)
        with image.open("r+b") as file:
            file.truncate(24 << 20)
        tapfs("resize", *DISK)
        guest.finish_load("xvda")
        guest.run(f"[ $(cat /sys/block/xvda/size) = {(24 << 20) // 512} ]")
        guest.run("echo the end >/tmp/text; dd if=/tmp/text of=/dev/xvda bs=512 seek=49151 conv=sync,fsync")
        assert image.read_bytes()[-512:].startswith(b"the end\n")
        tapfs("limit", *DISK, "--requests", "20")
        begin = time.monotonic()
        guest.start_load("xvda", 4, 4)
        limited = guest.finish_load("xvda")
        seconds = time.monotonic() - begin
        tapfs("limit", *DISK, "--requests", "0")
        guest.start_load("xvda", 4, 5)
        free = guest.finish_load("xvda")
        assert limited < min(20 * (seconds + 2), free), (limited, seconds, free)
        _fill_its_host(guest, image)
    return f"{limited} writes with the limit, {free} without"


def _fill_its_host(guest: Guest, image: Path) -> None:
    run("fallocate", "--punch-hole", "--offset", "16MiB", "--length", "1MiB", str(image))
    filler = image.with_name("filler")
    with filler.open("wb", buffering=0) as file:
        left = os.statvfs(image.parent)
        file.write(bytes(left.f_bavail * left.f_bsize))
    guest.run("((dd if=/bin/busybox of=/dev/xvda bs=64k seek=256 count=4 conv=fsync; echo DD-DONE $?) >/tmp/dd 2>&1 &)")
    wait_until("the guest to wait for space", lambda: "waiting: " in tapfs("list"))
    filler.unlink()
    tapfs("resume", *DISK)
    guest.run("until grep DD-DONE /tmp/dd; do sleep 0.2; done; grep -q 'DD-DONE 0' /tmp/dd")
    assert image.read_bytes()[16 << 20 :][: 256 << 10] == Path("/bin/busybox").read_bytes()[: 256 << 10]


@scenario(300)
def save_and_migrate(dom0: Dom0) -> str:
    """A guest at work goes on from a file, and in another domain: each write it was told of is there."""
    image = new_qcow("moved.qcow", 32)
    with dom0.shared_guest("live", {"xvda": f"tap:qcow:{image}"}) as guest:
        guest.start_load("xvda", 4, 15)
        time.sleep(2)
        guest.save_and_restore()
        time.sleep(2)
        guest.migrate()
        writes = guest.finish_load("xvda")
    tapfs("check", str(image))
    return f"{writes} writes"


@scenario(240)
def killed_under_pvh(dom0: Dom0) -> str:
    """The process of a PVH guest's disk is killed under load."""
    return killed_disk(dom0, PVH_GUEST, "pvh", "")


@scenario(300)
def migrate_by_xl(dom0: Dom0) -> str:
    """A PVH guest at work by `xl migrate` to this host: each write it was told of is there."""
    image = new_qcow("migrated.qcow", 32)
    with dom0.shared_guest(PVH_GUEST, {"xvda": f"tap:qcow:{image}"}, "pvh") as guest:
        guest.start_load("xvda", 4, 15)
        time.sleep(2)
        guest.migrate_by_xl()
        writes = guest.finish_load("xvda")
    tapfs("check", str(image))
    return f"{writes} writes"
