"""Images as block devices of a real kernel: file systems, processes that die under load, commands."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from tests.laboratory.commands import PATIENCE, attempt_tapfs, digest, run, tapfs, wait_until
from tests.laboratory.scenario import scenario
from tests.ublk.scenarios.block_devices import BlockDevices
from tests.ublk.scenarios.disks import MOUNT, TREE, kill_under_load, new_image, sum_of
from tests.ublk.scenarios.vhost_user import kill_vhost_user_server, vhost_user_device


@scenario(60)
def file_system(host: BlockDevices) -> None:
    """mkfs, a tree of files, discards and zeroes, fsck after another attach: all is there and the image is sound."""
    image = new_image("files.qcow2", 96)
    device = host.attach(image)
    run("mkfs.ext4", "-q", device)
    os.makedirs(MOUNT, exist_ok=True)
    run("mount", device, MOUNT)
    run("cp", "-r", TREE, f"{MOUNT}/tree")
    assert "is in use" in attempt_tapfs("detach", "--ublk", device).stdout, "a mounted device was detached"
    run("rm", "-r", f"{MOUNT}/tree/kernel")
    run("fstrim", MOUNT)
    run("cp", "-r", f"{TREE}/kernel", f"{MOUNT}/tree/")
    run("umount", MOUNT)
    host.detach(device)
    tapfs("check", image)
    device = host.attach(image, "--mode", "r")
    run("fsck.ext4", "-fn", device)
    run("mount", "-o", "ro", device, MOUNT)
    assert sum_of(f"{MOUNT}/tree") == sum_of(TREE)
    run("umount", MOUNT)
    host.detach(device)


@scenario(100)
def killed(host: BlockDevices) -> str:
    """Kill -9 under write load: the users see a pause, and every write that they were told of is there."""
    image = new_image("killed.qcow2", 32)
    device = host.attach(image)
    said = kill_under_load(host, device)
    counted = tapfs("stats", "--ublk", device)
    assert "ublkb0" in counted
    host.detach(device)
    tapfs("check", image, statuses=(0, 3))  # a crash may leak clusters, nothing else
    return said


@scenario(100)
def commands(host: BlockDevices) -> None:
    """A pause holds requests, a snapshot keeps what was, and a device without processes gets one by resume."""
    image = new_image("commands.qcow2", 16)
    device = host.attach(image)
    run("dd", "if=/dev/urandom", f"of={device}", "bs=1M", "count=4", "oflag=direct")
    tapfs("pause", "--ublk", device)
    with subprocess.Popen(["dd", "if=/dev/zero", f"of={device}", "bs=1M", "count=1", "oflag=direct"]) as writing:
        time.sleep(1)
        assert writing.poll() is None, "a paused device took a write"
        tapfs("resume", "--ublk", device)
        assert writing.wait(30 * PATIENCE) == 0
    held = digest(device)
    tapfs("swap", "--ublk", device, "/images/monday.qcow2")
    run("dd", "if=/dev/urandom", f"of={device}", "bs=1M", "count=2", "oflag=direct")
    now = digest(device)
    assert now != held
    assert attempt_tapfs("resize", "--ublk", device, "32M").returncode != 0
    os.kill(host.keeper(device), signal.SIGTERM)
    wait_until("both processes to end", lambda: host.keeper(device) == 0 and host.process(device) == 0)
    assert "tapfs resume" in tapfs("list")
    tapfs("resume", "--ublk", device)
    run("blockdev", "--flushbufs", device)
    assert digest(device) == now
    host.detach(device)
    tapfs("check", image)
    raw = Path("/images/monday.raw")
    tapfs("convert", "/images/monday.qcow2", "-O", "raw", str(raw))
    assert digest(raw) == held


@scenario(140)
def jobs(host: BlockDevices) -> str:
    """Under load a commit takes a snapshot back and a mirror moves the disk to another format; a kill loses nothing."""
    image = new_image("jobs.qcow2", 16)
    before, moved = Path("/images/before.qcow2"), Path("/images/moved.vhd")
    device = host.attach(image)
    with subprocess.Popen(["disk-load", "write", device, "4", "24", "7"], stdout=subprocess.PIPE, text=True) as load:
        time.sleep(2)
        tapfs("swap", "--ublk", device, str(before))
        time.sleep(2)
        said = tapfs("commit", "--ublk", device)
        assert not before.exists()
        tapfs("mirror", "--ublk", device, "-O", "vhd", "--pivot", str(moved))
        host.kill(device)
        written: str = load.communicate(timeout=60 * PATIENCE)[0].strip()
    assert load.returncode == 0, written
    held = digest(device)
    host.detach(device)
    assert Path(image).resolve() == moved
    raw = Path("/images/moved.raw")
    tapfs("convert", str(moved), "-O", "raw", str(raw))
    assert digest(raw) == held
    return said


@scenario(120)
def vhost_user(_host: BlockDevices) -> str:
    """The machine's own disk: a file system, then kill -9 of the server outside under write load loses nothing."""
    device = vhost_user_device()
    run("mkfs.ext4", "-q", device)
    os.makedirs(MOUNT, exist_ok=True)
    run("mount", device, MOUNT)
    run("cp", "-r", TREE, f"{MOUNT}/tree")
    run("umount", MOUNT)
    kill_vhost_user_server()
    run("fsck.ext4", "-fn", device)
    run("mount", "-o", "ro", device, MOUNT)
    assert sum_of(f"{MOUNT}/tree") == sum_of(TREE)
    run("umount", MOUNT)
    with subprocess.Popen(["disk-load", "write", device, "8", "12", "9"], stdout=subprocess.PIPE, text=True) as load:
        for _ in range(3):
            time.sleep(2)
            kill_vhost_user_server()
        said = load.communicate(timeout=60 * PATIENCE)[0].strip()
    assert load.returncode == 0, said
    return said.splitlines()[-1]
