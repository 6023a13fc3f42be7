"""PV and PVH guests booted by xl on disks of tapfs; disks that come and go while they run."""

from __future__ import annotations

from tests.laboratory.commands import run, tapfs
from tests.laboratory.scenario import scenario
from tests.xen.scenarios.contents import mounted, new_qcow, new_raw
from tests.xen.scenarios.dom0 import Dom0, xl_disk
from tests.xen.scenarios.guest import Guest

# Four pages of ring, as an administrator would ask for; without it Linux takes one.
LARGE_RING = "xen-blkfront.max_ring_page_order=2"


def use(guest: Guest, device: str) -> str:
    """Let the guest make a file system, write, mount again, compare; the digest of what it wrote."""
    guest.run(f"mke2fs -q -F {device} && mount {device} /mnt")
    guest.run("dd if=/dev/urandom of=/mnt/data bs=64k count=48; echo hello from the guest >/mnt/hello")
    written = guest.run("sha256sum </mnt/data")
    guest.run("umount /mnt; echo 3 >/proc/sys/vm/drop_caches")
    guest.run(f"mount {device} /mnt")
    assert guest.run("sha256sum </mnt/data") == written
    assert guest.run("cat /mnt/hello") == "hello from the guest"
    guest.run("umount /mnt")
    return written


def _look(dom0: Dom0, specification: str, written: str) -> None:
    """The same from dom0."""
    device = dom0.attach(specification, mode="r")
    run("e2fsck", "-fn", device)
    with mounted(device, "-o", "ro") as place:
        assert run("sh", "-c", f"sha256sum <{place}/data") == written
    dom0.detach()


def _boot(dom0: Dom0, kind: str, arguments: str) -> None:
    qcow, raw = new_qcow(f"{kind}.qcow", 32), new_raw(f"{kind}.img", 32)
    disks = (xl_disk(f"tap:qcow:{qcow}", "xvda"), xl_disk(f"tap:aio:{raw}", "xvdb"))
    with dom0.guest(kind, kind, disks, arguments) as guest:
        guest.wait_for_disk("xvda")
        on_qcow = use(guest, "/dev/xvda")
        on_raw = use(guest, "/dev/xvdb")
        for command in ("stats", "list"):
            assert "xvdb" in tapfs(command)
        guest.run("disk-load write /dev/xvdb 4 3 9", limit=90)
        on_raw = use(guest, "/dev/xvdb")
        guest.power_off()
    tapfs("check", str(qcow))
    _look(dom0, f"tap:qcow:{qcow}", on_qcow)
    _look(dom0, f"tap:aio:{raw}", on_raw)


@scenario(180)
def pv(dom0: Dom0) -> None:
    _boot(dom0, "pv", LARGE_RING)


@scenario(180)
def pvh(dom0: Dom0) -> None:
    _boot(dom0, "pvh", "")


@scenario(180)
def hot_plug(dom0: Dom0) -> None:
    """Both tools, to a guest that began without a disk."""
    qcow, raw = new_qcow("hot.qcow", 16), new_raw("hot.img", 16)
    with dom0.guest("hot") as guest:
        dom0.attach(f"tap:qcow:{qcow}", "xvdb", "hot")
        guest.wait_for_disk("xvdb")
        on_qcow = use(guest, "/dev/xvdb")
        dom0.xl_attach(f"tap:aio:{raw}", "xvdc", "hot")
        guest.wait_for_disk("xvdc")
        on_raw = use(guest, "/dev/xvdc")
        dom0.detach("xvdb", "hot")
        guest.wait_for_disk("xvdb", there=False)
        dom0.xl_detach("xvdc", "hot")
        guest.wait_for_disk("xvdc", there=False)
        dom0.attach(f"tap:qcow:{qcow}", "xvdb", "hot")
        guest.wait_for_disk("xvdb")
        guest.run("mount -o ro /dev/xvdb /mnt")
        assert guest.run("sha256sum </mnt/data") == on_qcow
        # It ends with the disk attached and mounted.
    tapfs("check", str(qcow))
    _look(dom0, f"tap:aio:{raw}", on_raw)
