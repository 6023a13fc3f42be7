"""Images as block devices of the newest kernel that Debian has, which can do what the other one cannot.

Its devices may get another size, and it moves data between files and requests without a copy.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from tapfs.ublk.attaching import ask, device_number
from tests.laboratory.commands import attempt_tapfs, digest, run, tapfs, wait_until
from tests.laboratory.scenario import scenario
from tests.ublk.scenarios.block_devices import IMAGES, BlockDevices
from tests.ublk.scenarios.disks import MOUNT, TREE, kill_under_load, new_image, sum_of


def _size(device: str) -> int:
    return int(run("blockdev", "--getsize64", device))


@scenario(60)
def resize(host: BlockDevices) -> None:
    """A mounted file system grows with its disk; fewer bytes only by force; the size outlives a kill."""
    image = new_image("grows.raw", 16, "raw")
    device = host.attach(image, "-f", "raw")
    run("mkfs.ext4", "-q", device)
    os.makedirs(MOUNT, exist_ok=True)
    run("mount", device, MOUNT)
    tapfs("resize", "--ublk", device, "48M")
    assert _size(device) == 48 << 20
    run("resize2fs", device)
    run("cp", "-r", TREE, f"{MOUNT}/tree")
    host.kill(device)
    assert _size(device) == 48 << 20
    assert sum_of(f"{MOUNT}/tree") == sum_of(TREE)
    run("umount", MOUNT)
    run("fsck.ext4", "-fn", device)
    assert "--force" in attempt_tapfs("resize", "--ublk", device, "32M").stdout
    tapfs("resize", "--ublk", device, "64M", "--force")
    held = digest(device)
    host.detach(device)
    assert Path(image).stat().st_size == 64 << 20
    assert digest(image) == held


def _passed(device: str) -> int:
    """The requests whose data went past the process that serves the device."""
    passed: int = ask(device_number(device), "statistics")["passed"]
    return passed


def _written_and_read(host: BlockDevices, image: str, *words: str) -> tuple[int, int]:
    """Write a disk, and read it as a new device; how many requests of each went past the process."""
    device = host.attach(image, *words)
    run("disk-load", "write", device, "4", "4", "5")
    written = _passed(device)
    held = digest(device)
    host.detach(device)
    device = host.attach(image, *words)
    assert digest(device) == held
    read = _passed(device)
    host.detach(device)
    if "raw" not in words:
        tapfs("check", image)
    raw = IMAGES / "copy.raw"
    key = words[words.index("--key-file") :][:2] if "--key-file" in words else ()
    raw.unlink(missing_ok=True)
    tapfs("convert", image, *(("-f", "raw") if "raw" in words else ()), *key, "-O", "raw", str(raw))
    assert digest(raw) == held
    return written, read


@scenario(160)
def zero_copy(host: BlockDevices) -> str:
    """What lies plainly in a file is moved by the kernel, all else by the server: the same bytes are read."""
    plain = _written_and_read(host, new_image("zero-copy.raw", 8, "raw"), "-f", "raw")
    direct = _written_and_read(host, new_image("direct.raw", 8, "raw"), "-f", "raw", "--direct")
    mapped = _written_and_read(host, new_image("zero-copy.qcow2", 8))
    assert min(*plain, *direct, *mapped) > 0, (plain, direct, mapped)
    key = IMAGES / "key"
    key.write_text("a password", encoding="ascii")
    image = str(IMAGES / "secret.qcow2")
    tapfs(
        "create", "-f", "qcow2", "-o", "encrypt.format=luks,encrypt.iter-time=10", "--key-file", str(key), image, "8M"
    )
    assert _written_and_read(host, image, "--key-file", str(key)) == (0, 0)
    return f"passed (writes, reads): raw {plain}, with O_DIRECT {direct}, qcow2 {mapped}, encrypted none"


@scenario(160)
def killed(host: BlockDevices) -> str:
    """Kill -9 under write load: the users see a pause, and every write that they were told of is there."""
    said: list[str] = []
    for image, words in (
        (new_image("killed.qcow2", 32), ()),
        (new_image("killed.raw", 32, "raw"), ("-f", "raw", "--direct")),
    ):
        device = host.attach(image, *words)
        said.append(kill_under_load(host, device, times=3))
        host.detach(device)
        if not words:
            tapfs("check", image, statuses=(0, 3))  # a crash may leak clusters, nothing else
    return "; ".join(said)


@scenario(160)
def killed_as_it_begins(host: BlockDevices) -> None:
    """Processes that are killed before they serve, each a little later than the last, and one that is left alone."""
    image = new_image("begins.raw", 8, "raw")
    device = host.attach(image, "-f", "raw")
    run("dd", "if=/dev/urandom", f"of={device}", "bs=1M", "count=8", "oflag=direct")
    held = digest(device)
    for pause in (0.0, 0.3, 0.6, 0.9, 1.2):
        before = host.process(device)
        os.kill(before, signal.SIGKILL)
        wait_until("another process to begin", lambda last=before: host.process(device) not in (0, last))
        time.sleep(pause)
    host.kill(device)
    assert digest(device) == held
    host.detach(device)
