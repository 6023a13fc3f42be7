"""`tapfs list`: mounts with their counters, RAM disks, text and JSON."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

from tapfs.cli.sizes import human_size
from tests.conftest import Ran
from tests.fuse.conftest import Mounts, wait_for

MIB = 1 << 20


def listed(mounts: Mounts) -> list[dict[str, object]]:
    """The mounts as JSON."""
    found: list[dict[str, object]] = json.loads(mounts.run("list", "--json").out)["mounts"]
    return found


def test_list(mounts: Mounts, sample: Path, tmp_path: Path) -> None:
    image = tmp_path / "image.qcow"
    assert mounts.run("create", "-f", "qcow", image, "1M").code == 0
    assert listed(mounts) == []
    first = mounts.mount(sample, "--engine", "pyfuse3")
    second = mounts.mount(image, "--rw", "--engine", "pyfuse3")
    entries = listed(mounts)
    names = ("image", "mountpoint", "shows", "mode", "format", "engine", "alive")
    assert [tuple(entry[name] for name in names) for entry in entries] == [
        (str(sample), str(first), "disk", "ro", "raw", "pyfuse3", True),
        (str(image), str(second), "disk", "rw", "qcow", "pyfuse3", True),
    ]
    assert sorted(int(str(entry["pid"])) for entry in entries) == sorted(mounts.processes())
    shown = mounts.run("list").out
    assert shown.startswith("mounted:\n")
    assert re.search(rf"^  {re.escape(str(second))}:\s+{re.escape(str(image))}$", shown, re.MULTILINE)
    facts = r"disk, rw, qcow, engine pyfuse3, [0-9.]+ [KM]?i?B read, 0 B written, process"
    assert re.search(rf"^    {facts} {entries[1]['pid']}$", shown, re.MULTILINE)
    assert all(len(line) <= 80 for line in shown.splitlines() if "/" not in line)
    mounts.umount(first)
    mounts.umount(second)


def test_counters(mounts: Mounts, tmp_path: Path) -> None:
    image = tmp_path / "image.qcow"
    assert mounts.run("create", "-f", "qcow", image, "16M").code == 0
    directory = mounts.mount(image, "--rw")
    (before,) = listed(mounts)
    descriptor = os.open(directory / "disk", os.O_RDWR | os.O_DIRECT)
    try:
        data = memoryview(bytearray(MIB + 4096))
        assert os.preadv(descriptor, [_aligned(data)], 4 * MIB) == MIB
        assert os.pwritev(descriptor, [_aligned(data)], 8 * MIB) == MIB
    finally:
        os.close(descriptor)
    (after,) = listed(mounts)
    for name in ("bytes_read", "bytes_written"):
        assert isinstance(before[name], int)
        assert int(str(after[name])) - before[name] == MIB, name
    assert f"{human_size(int(str(after['bytes_written'])))} written" in mounts.run("list").out
    mounts.umount(directory)


def _aligned(buffer: memoryview) -> memoryview:
    """A MiB of the buffer that starts where direct I/O wants it."""
    import ctypes

    start = -ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % 4096
    return buffer[start : start + MIB]


def test_what_the_kernel_serves_is_not_counted(mounts: Mounts, sample: Path) -> None:
    directory = mounts.mount(sample, "--engine", "passthrough")
    (entry,) = listed(mounts)
    assert (entry["engine"], entry["bytes_read"], entry["bytes_written"]) == ("passthrough", None, None)
    assert "engine passthrough, not counted, process" in mounts.run("list").out
    mounts.umount(directory)


def test_ram_disks(mounts: Mounts, ram_name: str) -> None:
    assert mounts.run("create", "-f", "ram", ram_name, "1M").code == 0
    name = ram_name.removeprefix("ram:")
    disks = json.loads(mounts.run("list", "--json").out)["ram_disks"]
    assert {"name": name, "size": MIB, "allocated": 0} in disks
    assert f"  {ram_name}: 1 MiB, 0 B taken\n" in mounts.run("list").out


def test_a_stopped_process_does_not_stop_the_listing(mounts: Mounts, sample: Path) -> None:
    directory = mounts.mount(sample, "--engine", "pyfuse3")
    (pid,) = mounts.processes()
    os.kill(pid, signal.SIGSTOP)
    try:
        (entry,) = listed(mounts)
        assert entry["alive"]
        assert entry["bytes_read"] is None
    finally:
        os.kill(pid, signal.SIGCONT)
    mounts.umount(directory)


def test_umount_of_several(mounts: Mounts, sample: Path) -> None:
    first, second = mounts.mount(sample), mounts.mount(sample)
    done = mounts.run("umount", first, mounts.folder, second)
    assert done.code == 17
    assert done.err == f"tapfs: error: {mounts.folder}: no image is mounted here\n"
    assert mounts.left_behind() == []


def test_umount_all(mounts: Mounts, sample: Path) -> None:
    first, second = mounts.mount(sample), mounts.mount(sample)
    mounts.kill(mounts.processes()[0])
    wait_for(lambda: len(mounts.processes()) == 1)
    done = mounts.run("umount", "--all")
    assert (done.code, done.err.count("had died")) == (0, 1)
    assert mounts.left_behind() == []
    assert list(first.iterdir()) == list(second.iterdir()) == []
    assert mounts.run("umount", "--all") == Ran(0, "", "")
    for words in ([], ["--all", first]):
        assert mounts.run("umount", *words).code == 64


def test_umount_of_an_image(mounts: Mounts, sample: Path, tmp_path: Path, ram_name: str) -> None:
    link = tmp_path / "link"
    link.symlink_to(sample)
    first, second = mounts.mount(sample), mounts.mount(sample)
    done = mounts.run("umount", sample)
    assert (done.code, done.err.count(str(first)), done.err.count(str(second))) == (64, 1, 1)
    mounts.umount(first)
    assert mounts.run("umount", link) == Ran(0, "", "")
    assert mounts.run("umount", sample) == Ran(17, "", f"tapfs: error: {sample}: is not mounted\n")
    assert mounts.run("create", ram_name, "1M").code == 0
    third = mounts.directory()
    assert mounts.run("mount", ram_name, third).code == 0
    assert mounts.run("umount", ram_name) == Ran(0, "", "")
    assert mounts.run("umount", ram_name).code == 17
