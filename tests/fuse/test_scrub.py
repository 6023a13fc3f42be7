"""`tapfs scrub`: the disks that are in use are read by the processes that serve them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

import tapfs
from tapfs.jobs.hashing import write_sidecar
from tests.fuse.conftest import Mounts, wait_for


@pytest.mark.parametrize("mounts", ["native"], indirect=True)
def test_mounts_and_served_disks_are_compared_with_their_sidecars(mounts: Mounts, sample: Path, tmp_path: Path) -> None:
    images = {name: tmp_path / f"{name}.qcow2" for name in ("spoiled", "plain", "served")}
    for image in images.values():
        tapfs.convert(sample, image, format="raw", target_format="qcow2")
    for name in ("spoiled", "served"):
        with tapfs.open(images[name]) as disk:
            write_sidecar(disk, f"{images[name]}.tapfs-hash")
    spoiled = images["spoiled"]
    with tapfs.open(spoiled) as disk:
        extent = next(each for each in disk.extents(1 << 20) if each.host_offset is not None)
    status = spoiled.stat()
    with spoiled.open("r+b") as file:
        file.seek(extent.host_offset)
        file.write(b"spoiled")
    os.utime(spoiled, ns=(status.st_atime_ns, status.st_mtime_ns))
    directories = {name: mounts.mount(images[name]) for name in ("spoiled", "plain")}
    socket = tmp_path / "nbd.sock"
    server = mounts.start("serve", "--socket", socket, images["served"])
    try:
        wait_for(lambda: socket.exists() or server.poll() is not None)
        ran = mounts.run("scrub", "--mounted", "--json", "-r", "1G")
        found = {each["path"].rpartition("/")[2]: each for each in json.loads(ran.out)["disks"]}
        assert {name: found[f"{name}.qcow2"]["verdict"] for name in images} == {
            "spoiled": "damaged",
            "plain": "readable",
            "served": "same",
        }
        assert ran.code == 2
        assert found["spoiled.qcow2"]["differing"] == [{"offset": extent.offset, "length": 65536}]
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate()
        (mounts.runtime / "served").rmdir()
        for directory in directories.values():
            subprocess.run([*mounts.command, "umount", str(directory)], check=True, env=mounts.environment)


@pytest.mark.parametrize("mounts", ["native"], indirect=True)
def test_what_is_scrubbed_must_be_said(mounts: Mounts) -> None:
    assert mounts.run("scrub").code == 64
    assert mounts.run("scrub", "--mounted", "-r", "fast").code == 64
