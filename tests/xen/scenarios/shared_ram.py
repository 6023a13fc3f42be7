"""One RAM disk, two guests that write it: each sees the other's writes, and the disk outlives both."""

from __future__ import annotations

from tests.laboratory.commands import run, tapfs
from tests.laboratory.scenario import scenario
from tests.xen.scenarios.dom0 import Dom0, xl_disk
from tests.xen.scenarios.guest import Guest


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
    tapfs("create", "-f", "ram", "ram:shared", "8M")
    disk = (xl_disk("tap:ram:shared", "xvda"),)
    with dom0.guest("one", "pv", disk) as one:
        with dom0.guest("two", "pv", disk) as two:
            for guest in (one, two):
                guest.wait_for_disk("xvda")
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
