"""Processes that die under write load: the guest only sees a pause, and every write it was told of is there.

One PV guest has the disks of these scenarios in turn, and is destroyed by the last of them.
"""

from __future__ import annotations

import os
import signal
import time

from tests.laboratory.commands import say, tapfs, wait_until
from tests.laboratory.scenario import scenario
from tests.xen.scenarios.contents import new_qcow, new_raw
from tests.xen.scenarios.dom0 import Dom0, disk_processes, read_store
from tests.xen.scenarios.guest import Guest

GUEST = "victim"
# Four pages of ring, as an administrator would ask for; without it Linux takes one.
LARGE_RING = "xen-blkfront.max_ring_page_order=2"


def _await_process(dom0: Dom0, guest: Guest, vdev: str, dead: int) -> int:
    """Wait for the successor of a dead process."""

    def there() -> bool:
        entry = read_store(f"{dom0.backend(guest.domain, vdev)}/tapfs/process")
        return bool(entry) and int(entry.split(":")[0]) not in {0, dead}

    wait_until(f"a new process for {vdev}", there)
    return dom0.disk_process(guest.domain, vdev)


def killed_disk(dom0: Dom0, name: str, kind: str, arguments: str) -> str:
    """The process of a disk is killed again and again under load, and that of the other disk goes on."""
    qcow, raw = new_qcow("killed.qcow", 32), new_raw("other.img", 16)
    disks = {"xvda": f"tap:qcow:{qcow}", "xvdb": f"tap:aio:{raw}"}
    with dom0.shared_guest(name, disks, kind, arguments) as guest:
        other = dom0.disk_process(guest.domain, "xvdb")
        guest.start_load("xvdb", 2, 12)
        guest.start_load("xvda", 8, 12)
        process = dom0.disk_process(guest.domain, "xvda")
        for _ in range(3):
            time.sleep(3)
            say(f"kill -9 {process}")
            os.kill(process, signal.SIGKILL)
            process = _await_process(dom0, guest, "xvda", process)
        writes = guest.finish_load("xvda")
        guest.finish_load("xvdb")
        assert dom0.disk_process(guest.domain, "xvdb") == other, "the other disk's process did not go on"
    tapfs("check", str(qcow), statuses=(0, 3))  # a crash may leak clusters, nothing else
    return f"{writes} writes"


@scenario(240)
def disk_process(dom0: Dom0) -> str:
    return killed_disk(dom0, GUEST, "pv", LARGE_RING)


@scenario(240)
def with_persistent_grants(dom0: Dom0) -> str:
    """The successor maps the guest's pages anew."""
    image = new_qcow("persistent.qcow", 32)
    with dom0.shared_guest(GUEST, {}) as guest:
        dom0.attach_with_grants(f"tap:qcow:{image}", "xvda", guest.domain, "persistent")
        guest.wait_for_disk("xvda")
        guest.start_load("xvda", 8, 8)
        time.sleep(3)
        process = dom0.disk_process(guest.domain, "xvda")
        os.kill(process, signal.SIGKILL)
        _await_process(dom0, guest, "xvda", process)
        writes = guest.finish_load("xvda")
        dom0.detach("xvda", GUEST)
    tapfs("check", str(image), statuses=(0, 3))
    return f"{writes} writes"


@scenario(240)
def daemon(dom0: Dom0) -> str:
    """The daemon is killed: the disks go on without it, and its successor has them."""
    image = new_qcow("orphan.qcow", 32)
    with dom0.shared_guest(GUEST, {"xvda": f"tap:qcow:{image}"}) as guest:
        process = dom0.disk_process(guest.domain, "xvda")
        guest.start_load("xvda", 8, 12)
        time.sleep(2)
        dom0.stop_daemon(signal.SIGKILL)
        time.sleep(2)
        assert disk_processes() == [process]
        dom0.start_daemon()
        time.sleep(4)
        assert disk_processes() == [process], "the successor started a second process"
        # It is the successor's now: what dies is started again.
        os.kill(process, signal.SIGKILL)
        _await_process(dom0, guest, "xvda", process)
        writes = guest.finish_load("xvda")
    tapfs("check", str(image), statuses=(0, 3))
    return f"{writes} writes"


@scenario(240)
def both_at_once(dom0: Dom0) -> str:
    """The daemon and the disk's process are killed; a new daemon takes the ring up."""
    image = new_qcow("both.qcow", 32)
    with dom0.shared_guest(GUEST, {"xvda": f"tap:qcow:{image}"}) as guest:
        guest.start_load("xvda", 8, 8)
        time.sleep(2)
        process = dom0.disk_process(guest.domain, "xvda")
        dom0.stop_daemon(signal.SIGKILL)
        os.kill(process, signal.SIGKILL)
        dom0.start_daemon()
        _await_process(dom0, guest, "xvda", process)
        writes = guest.finish_load("xvda")
    tapfs("check", str(image), statuses=(0, 3))
    return f"{writes} writes"


@scenario(240)
def shutdown_under_load(dom0: Dom0) -> str:
    """SIGTERM: all is drained and flushed, the image is clean while nobody serves it, and the guest goes on later."""
    image = new_qcow("stopped.qcow", 32)
    with dom0.shared_guest(GUEST, {"xvda": f"tap:qcow:{image}"}) as guest:
        guest.start_load("xvda", 8, 10)
        time.sleep(3)
        assert dom0.stop_daemon() == 0
        assert disk_processes() == []
        tapfs("check", str(image))
        dom0.start_daemon()
        writes = guest.finish_load("xvda")
    tapfs("check", str(image))
    return f"{writes} writes"


@scenario(180)
def destroyed_guest(dom0: Dom0) -> None:
    """It is gone in the middle of its writes: the images are closed and sound, the directories gone."""
    image, hot = new_qcow("destroyed.qcow", 32), new_qcow("destroyed-hot.qcow", 32)
    with dom0.shared_guest(GUEST, {"xvda": f"tap:qcow:{image}"}) as guest:
        dom0.attach(f"tap:qcow:{hot}", "xvdb", GUEST)
        for vdev in ("xvda", "xvdb"):
            guest.wait_for_disk(vdev)
            guest.start_load(vdev, 4, 60)
        time.sleep(3)
        guest.destroy()
    wait_until("the disk processes to end", lambda: not disk_processes())
    for path in (image, hot):
        tapfs("check", str(path))
