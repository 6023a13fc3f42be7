"""PV and PVH guests booted by xl on disks of tapfs; disks that come and go while they run."""

from __future__ import annotations

import signal
from pathlib import Path

from tests.laboratory.commands import run, tapfs, wait_until
from tests.laboratory.scenario import scenario
from tests.xen.scenarios.contents import mounted, new_qcow, new_raw
from tests.xen.scenarios.dom0 import Dom0, vdev_number, xl_disk
from tests.xen.scenarios.guest import Guest

# Four pages of ring, as an administrator would ask for; without it Linux takes one.
LARGE_RING = "xen-blkfront.max_ring_page_order=2"

_BACKENDS = Path("/sys/bus/xen-backend")


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


def _trim(guest: Guest, device: str, image: Path) -> None:
    """What the guest's file system does not use is given back to the host."""
    guest.run(f"mount {device} /mnt && dd if=/dev/urandom of=/mnt/gone bs=64k count=32 && sync && rm /mnt/gone && sync")
    before = image.stat().st_blocks
    guest.run("fstrim /mnt && umount /mnt")
    after = image.stat().st_blocks
    assert after < before - 2048, f"{before} blocks before fstrim, {after} after it"


def _use_both_queues(guest: Guest) -> None:
    """Write by each processor, so that each ring has requests."""
    guest.run("[ $(ls /sys/block/xvda/mq | wc -l) = 2 ]")
    for processor in (1, 2):
        guest.run(f"taskset {processor} dd if=/bin/busybox of=/dev/xvda bs=64k seek={processor} count=4 oflag=direct")
    used = guest.run("awk '/blkif/ && $2 + $3 > 0 { used++ } END { print used }' /proc/interrupts")
    assert int(used) >= 3, f"{used} rings of two disks with two each were used"


def _boot(dom0: Dom0, kind: str, arguments: str, processors: int = 1) -> None:
    qcow, raw = new_qcow(f"{kind}.qcow", 32), new_raw(f"{kind}.img", 32)
    disks = (xl_disk(f"tap:qcow:{qcow}", "xvda"), xl_disk(f"tap:aio:{raw}", "xvdb"))
    with dom0.guest(kind, kind, disks, arguments, processors=processors) as guest:
        guest.wait_for_disk("xvda")
        if processors > 1:
            _use_both_queues(guest)
        on_qcow = use(guest, "/dev/xvda")
        on_raw = use(guest, "/dev/xvdb")
        for command in ("stats", "list"):
            assert "xvdb" in tapfs(command)
        guest.run("disk-load write /dev/xvdb 4 3 9", limit=90)
        on_raw = use(guest, "/dev/xvdb")
        _trim(guest, "/dev/xvdb", raw)
        guest.power_off()
    tapfs("check", str(qcow))
    _look(dom0, f"tap:qcow:{qcow}", on_qcow)
    _look(dom0, f"tap:aio:{raw}", on_raw)


@scenario(180)
def pv(dom0: Dom0) -> None:
    """With two processors, and so two rings a disk: a PVH guest with two takes a minute to boot."""
    _boot(dom0, "pv", LARGE_RING, processors=2)


@scenario(180)
def pvh(dom0: Dom0) -> None:
    _boot(dom0, "pvh", "")


def _load_kernel_backend(dom0: Dom0, guest: Guest) -> None:
    """xen-blkback is loaded while the guest writes to a disk of xl; both backends have theirs then."""
    other, of_kernel = new_raw("beside-blkback.img", 16), new_raw("of-blkback.img", 16)
    guest.start_load("xvdc", 2, 12)
    dom0.stop_daemon(signal.SIGKILL)
    run("modprobe", "-r", "xen-blkback")
    dom0.start_daemon()
    wait_until("xen-blkback", (_BACKENDS / "drivers/vbd").exists)
    guest.finish_load("xvdc")
    loop = run("losetup", "-f", "--show", str(of_kernel))
    run("xl", "block-attach", guest.name, f"phy:{loop},xvde,w")
    dom0.xl_attach(f"tap:aio:{other}", "xvdd", guest.name)
    for vdev, has_driver in (("xvdc", False), ("xvdd", False), ("xvde", True)):
        guest.wait_for_disk(vdev)
        use(guest, f"/dev/{vdev}")
        driver = _BACKENDS / f"devices/vbd-{guest.domain}-{vdev_number(vdev)}/driver"
        assert driver.exists() == has_driver, vdev
    for vdev in ("xvdd", "xvde"):
        dom0.xl_detach(vdev, guest.name)
    run("losetup", "-d", loop)


@scenario(240)
def hot_plug(dom0: Dom0) -> None:
    """Both tools, to a guest that began without a disk; then the kernel's backend comes, and takes none of them."""
    qcow, raw = new_qcow("hot.qcow", 16), new_raw("hot.img", 16)
    with dom0.guest("hot") as guest:
        dom0.attach(f"tap:qcow:{qcow}", "xvdb", "hot")
        guest.wait_for_disk("xvdb")
        on_qcow = use(guest, "/dev/xvdb")
        dom0.xl_attach(f"tap:aio:{raw}", "xvdc", "hot")
        guest.wait_for_disk("xvdc")
        use(guest, "/dev/xvdc")
        _load_kernel_backend(dom0, guest)
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
