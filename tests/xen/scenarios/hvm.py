"""An HVM guest that SeaBIOS boots from a disk of tapfs."""

from __future__ import annotations

import os
import select
import time
from pathlib import Path

import tapfs as library
from tests.laboratory.commands import PATIENCE, attempt_tapfs, run, tapfs, wait_until
from tests.laboratory.scenario import scenario
from tests.xen.boot_sector import COPY_SECTOR, SECTOR, TEXT_SECTOR, bootable
from tests.xen.scenarios.contents import new_qcow, new_raw
from tests.xen.scenarios.dom0 import Dom0, read_store, xl_disk


@scenario(120)
def by_seabios(dom0: Dom0) -> None:
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
