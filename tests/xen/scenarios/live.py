"""Operations on a disk while a guest works on it: pause, snapshot, resize, limit."""

from __future__ import annotations

import time

from tests.xen.scenarios.commands import digest, tapfs, wait_until
from tests.xen.scenarios.contents import new_qcow, new_raw
from tests.xen.scenarios.dom0 import IMAGES, Dom0, xl_disk
from tests.xen.scenarios.scenario import scenario

DISK = ("--domain", "live", "--vdev", "xvda")


@scenario(180)
def pause_and_snapshot(dom0: Dom0) -> str:
    """Writes before the snapshot are in what was kept, those after it in the disk, by its name after a reboot."""
    disk, kept = new_qcow("live.qcow", 32), IMAGES / "live-kept.qcow"
    kept.unlink(missing_ok=True)
    disks = (xl_disk(f"tap:qcow:{disk}", "xvda"),)
    with dom0.guest("live", "pv", disks) as guest:
        guest.wait_for_disk("xvda")
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
        guest.power_off()
    with dom0.guest("live", "pv", disks) as guest:  # the same configuration, as after a reboot
        guest.wait_for_disk("xvda")
        guest.run("dd if=/dev/xvda bs=512 skip=65001 count=1 | grep -q 'after the snapshot'")
        guest.power_off()
    for image in (kept, disk):
        tapfs("check", str(image))
    for image, texts in ((kept, "before the snapshot"), (disk, "before the snapshotafter the snapshot")):
        flat = IMAGES / "flat.img"
        tapfs("convert", "-O", "raw", str(image), str(flat))
        data = flat.read_bytes()[65000 * 512 : 65002 * 512]
        assert data.replace(b"\0", b"").replace(b"\n", b"") == texts.encode(), (image, data[:32], data[512:544])
    return f"{writes} writes"


@scenario(180)
def resize_and_limits(dom0: Dom0) -> str:
    """The guest sees a new size at once, under load, and can write to the end; then its rate is limited, and freed."""
    image = new_raw("grow.img", 16)
    with dom0.guest("live", "pv", (xl_disk(f"tap:aio:{image}", "xvda"),)) as guest:
        guest.wait_for_disk("xvda")
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
        guest.power_off()
    return f"{limited} writes with the limit, {free} without"
