"""One disk of two domains: a RAM disk that two guests write, and the image of a guest and its stub domain."""

from __future__ import annotations

import os
import signal

from tests.laboratory.commands import run, say, tapfs
from tests.laboratory.scenario import scenario
from tests.xen.scenarios.contents import new_qcow
from tests.xen.scenarios.dom0 import Dom0, disk_processes
from tests.xen.scenarios.guest import Guest

#: Two guests that run from the first scenario on.
GUEST, STUB = "whole", "whole-dm"


def _write(guest: Guest, block: int) -> str:
    """Write a block of random data; its digest."""
    guest.run("dd if=/dev/urandom of=/tmp/block bs=64k count=1")
    guest.run(f"dd if=/tmp/block of=/dev/xvda bs=64k seek={block} oflag=direct conv=notrunc")
    return guest.run("sha256sum </tmp/block")


def _read(guest: Guest, block: int) -> str:
    guest.run(f"dd if=/dev/xvda of=/tmp/read bs=64k count=1 skip={block} iflag=direct")
    return guest.run("sha256sum </tmp/read")


@scenario(240)
def two_guests(dom0: Dom0) -> None:
    """Each sees the other's writes, and the disk outlives both."""
    tapfs("create", "-f", "ram", "ram:shared", "8M")
    disk = {"xvda": "tap:ram:shared"}
    with dom0.shared_guest(GUEST, disk) as one:
        with dom0.shared_guest(STUB, disk) as two:
            first = _write(one, 3)
            assert _read(two, 3) == first
            second = _write(two, 5)
            assert _read(one, 5) == second
            third = _write(two, 3)
            assert _read(one, 3) == third != first
            last = _write(two, 100)
        assert _read(one, 100) == last
    device = dom0.attach("tap:ram:shared", mode="r")
    run("dd", f"if={device}", "of=/tmp/block", "bs=64k", "count=1", "skip=100")
    assert run("sh", "-c", "sha256sum </tmp/block") == last
    dom0.detach()
    tapfs("remove", "ram:shared")


@scenario(240)
def guest_and_stub_domain(dom0: Dom0) -> str:
    """Two frontends of two domains, by what libxl writes for a stub domain's disk: one process, and one image.

    Both are PV guests, for no package has a stub domain. Its key `target` names the guest before its disk is attached.
    """
    image = new_qcow("with-stub.qcow", 16)
    disk = f"tap:qcow:{image}"
    with dom0.shared_guest(GUEST, {"xvda": disk}) as guest, dom0.shared_guest(STUB, {}) as stub:
        run("xenstore-write", f"/local/domain/{stub.domain}/target", str(guest.domain))
        dom0.xl_attach(disk, "xvda", STUB)
        stub.wait_for_disk("xvda")
        process = dom0.disk_process(guest.domain, "xvda")
        assert disk_processes() == [process] == [dom0.disk_process(stub.domain, "xvda")]
        by_stub, by_guest = _write(stub, 3), _write(guest, 5)
        assert (_read(guest, 3), _read(stub, 5)) == (by_stub, by_guest)
        guest.start_load("xvda", 4, 8)
        say(f"kill -9 {process}")
        os.kill(process, signal.SIGKILL)
        _read(stub, 7)
        writes = guest.finish_load("xvda")
        assert disk_processes() != [process]
        assert _read(guest, 7) == _read(stub, 7)
        dom0.xl_detach("xvda", STUB)
        last = _write(guest, 9)
        assert _read(guest, 9) == last
        guest.power_off()
    tapfs("check", str(image), statuses=(0, 3))
    return f"{writes} writes"
