"""PV, PVH and HVM guests booted by xl on disks of tapfs; disks that come and go while they run."""

from __future__ import annotations

import os
import select
import time
from pathlib import Path

import tapfs as library
from tests.xen.boot_sector import COPY_SECTOR, SECTOR, TEXT_SECTOR, bootable
from tests.xen.scenarios.commands import PATIENCE, attempt_tapfs, run, tapfs, wait_until
from tests.xen.scenarios.contents import mounted, new_qcow, new_raw
from tests.xen.scenarios.dom0 import Dom0, read_store, xl_disk
from tests.xen.scenarios.guest import Guest
from tests.xen.scenarios.scenario import scenario

# Four pages of ring, as an administrator would ask for; without it Linux takes one.
LARGE_RING = "xen-blkfront.max_ring_page_order=2"


def _use(guest: Guest, device: str) -> str:
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
        on_qcow = _use(guest, "/dev/xvda")
        on_raw = _use(guest, "/dev/xvdb")
        for command in ("stats", "list"):
            assert "xvdb" in tapfs(command)
        guest.run("disk-load write /dev/xvdb 4 3 9", limit=90)
        on_raw = _use(guest, "/dev/xvdb")
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
        on_qcow = _use(guest, "/dev/xvdb")
        dom0.xl_attach(f"tap:aio:{raw}", "xvdc", "hot")
        guest.wait_for_disk("xvdc")
        on_raw = _use(guest, "/dev/xvdc")
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


@scenario(120)
def hvm_by_seabios(dom0: Dom0) -> None:
    """SeaBIOS boots from the disk that libxl gives to QEMU; the boot sector reads and writes it."""
    # The first disk of a supervisor waits until all is loaded, which on a busy machine takes longer than libxl waits.
    first = (f"tap:sync:{new_raw('first.img', 1)}", "--domain", "0", "--vdev", "xvdh")
    wait_until("the supervisor", lambda: attempt_tapfs("attach", *first).returncode == 0)
    dom0.detach("xvdh")
    words, mebibytes = "booted from tapfs", 8
    qcow = new_qcow("hvm.qcow", mebibytes)
    with library.open(qcow, format="qcow", writable=True) as image:
        image.write(0, bootable(mebibytes << 20, words)[: 4 * SECTOR])
    configuration = Path("/tmp/hvm.cfg")  # noqa: S108 - dom0 has one user
    configuration.write_text(
        'name = "hvm"\ntype = "hvm"\nmemory = 64\nvcpus = 1\nboot = "c"\nserial = "pty"\n'
        "vnc = 0\nsdl = 0\nnographic = 1\n"
        f"disk = {[xl_disk(f'tap:qcow:{qcow}', 'xvda')]!r}\n",
        encoding="utf-8",
    )
    run("xl", "create", "-q", str(configuration), limit=60)
    try:
        domain = run("xl", "domid", "hvm")
        address = read_store(f"/local/domain/0/backend/vbd/{domain}/51712/physical-device-path") or ""
        assert address.startswith("nbd+unix:///?socket="), address
        assert address in Path(f"/proc/{_device_model(domain)}/cmdline").read_text(encoding="utf-8")
        said = _hear(f"/local/domain/{domain}/serial/0/tty", len(words))
        assert words in said, said
        stats = tapfs("list")
        assert "hvm.qcow" in stats, stats
        time.sleep(1)
    finally:
        run("xl", "destroy", "hvm")
    wait_until("the image to be closed", lambda: not Path(address.partition("=")[2]).exists())
    with library.open(qcow, format="qcow") as image:
        copied = image.read(COPY_SECTOR * SECTOR, SECTOR)
        assert copied == image.read(TEXT_SECTOR * SECTOR, SECTOR), copied[:32]
    tapfs("check", str(qcow))


def _device_model(domain: str) -> str:
    """The process of QEMU."""
    number = read_store(f"/local/domain/{domain}/image/device-model-pid")
    assert number, "libxl has noted no device model"
    return number


def _hear(key: str, least: int) -> str:
    """What a serial port says, once it has said so much."""
    wait_until("the serial port", lambda: read_store(key))
    terminal = os.open(read_store(key) or "", os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
    heard = b""
    end = time.monotonic() + 30 * PATIENCE
    try:
        while len(heard) < least and time.monotonic() < end:
            if select.select([terminal], [], [], 1)[0]:
                heard += os.read(terminal, 4096)
    finally:
        os.close(terminal)
    return heard.decode(errors="replace")
