"""Mounts whose server is killed while programs use them: the programs wait, and find what they had written."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tapfs
from tapfs.serving.processes import process_start
from tests.fuse.conftest import MIB, Mounts, is_keeper, make_file_system, refused, wait_for

native = pytest.mark.parametrize("mounts", ["native"], indirect=True)

#: Writes blocks all over the file that it is given, by four threads, and compares what it reads.
_LOAD = """
import os, random, sys, threading
path, seed, blocks, turns = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
fd = os.open(path, os.O_RDWR)
def work(part):
    choice, model = random.Random(seed + part), {}
    for turn in range(turns):
        block = choice.randrange(blocks // 4) * 4 + part
        if block in model and choice.random() < 0.4:
            assert os.pread(fd, 4096, block * 4096) == model[block], (part, turn, block)
            continue
        data = choice.randbytes(4096)
        assert os.pwrite(fd, data, block * 4096) == 4096
        model[block] = data
        if turn % 40 == 39:
            os.fsync(fd)
    for block, data in model.items():
        assert os.pread(fd, 4096, block * 4096) == data, (part, block)
    done.append(part)
done = []
threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert sorted(done) == [0, 1, 2, 3]
os.close(fd)
"""


def write(directory: Path, data: bytes) -> None:
    """Write to the start of a mounted disk."""
    with (directory / "disk").open("r+b", buffering=0) as disk:
        assert disk.write(data) == len(data)


def entry(mounts: Mounts) -> dict[str, int]:
    """What the one mount has noted of itself."""
    (path,) = mounts.runtime.glob("*.json")
    found: dict[str, int] = json.loads(path.read_text())
    return found


def kill_server(mounts: Mounts, *, before: int = 0) -> int:
    """Kill the server, another one than `before`, once it answers and its keeper could go on; its number."""
    wait_for(lambda: entry(mounts)["server"] != before)
    pid = entry(mounts)["server"]
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: process_start(pid) is None)
    return pid


@pytest.mark.parametrize(
    ("mounts", "format_name", "option", "turns"),
    [
        ("native", "qcow2", "--rw", 600),
        ("native", "vhdx", "--rw", 600),
        ("native", "raw", "--overlay", 600),
        ("native", "raw", "--temp", 600),
        ("pyfuse3", "qcow2", "--rw", 150),
    ],
    indirect=["mounts"],
)
def test_programs_only_wait(mounts: Mounts, tmp_path: Path, format_name: str, option: str, turns: int) -> None:
    image, over = tmp_path / "image", tmp_path / "over"
    assert mounts.run("create", "-f", format_name, image, "16M").code == 0
    directory = mounts.mount(image, "-f", format_name, option, *([over] if option == "--overlay" else []))
    words = [sys.executable, "-c", _LOAD, str(directory / "disk"), "7", "4096", str(turns)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as load:
        killed = 0
        for _ in range(3):
            killed = kill_server(mounts, before=killed)
            time.sleep(0.1)
        _, said = load.communicate(timeout=60)
    assert (load.returncode, said) == (0, "")
    expected = (directory / "disk").read_bytes()
    mounts.umount(directory)
    assert mounts.left_behind() == []
    written = over if option == "--overlay" else image
    # A write that was not answered when the server was killed may have had its place: a leak, and no corruption.
    assert mounts.run("check", "-f", "qcow" if written == over else format_name, written).code in (0, 3, 63)
    flat = tmp_path / "flat"
    assert mounts.run("convert", "-O", "raw", written, flat).code == 0
    assert flat.read_bytes() == (bytes(16 * MIB) if option == "--temp" else expected)


@native
@pytest.mark.parametrize(("option", "shown"), [("--rw", "qcow2"), ("--temp", "qcow")])
def test_what_was_answered_is_there_without_a_flush(mounts: Mounts, tmp_path: Path, option: str, shown: str) -> None:
    image = tmp_path / "image"
    assert mounts.run("create", "-f", "qcow2", image, "16M").code == 0
    directory = mounts.mount(image, option)
    descriptor = os.open(directory / "disk", os.O_RDWR)
    data = random.Random(3).randbytes(MIB)
    for offset in (0, 5 * MIB, 9 * MIB):
        assert os.pwrite(descriptor, data, offset) == MIB
    kill_server(mounts)
    assert [os.pread(descriptor, MIB, offset) == data for offset in (0, 5 * MIB, 9 * MIB)] == [True] * 3
    os.close(descriptor)
    assert sorted(os.listdir(directory)) == ["disk", "info.json"]
    assert json.loads((directory / "info.json").read_text())["format"] == shown
    mounts.umount(directory)


def read_afresh(descriptor: int, offset: int = 0) -> bytes:
    """Up to 1 MiB of an open file, not from the kernel's memory."""
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    return os.pread(descriptor, MIB, offset)


def test_files_that_are_open_stay_open(mounts: Mounts, tmp_path: Path) -> None:
    """Also what pyfuse3 serves: documents, snapshots, and the disk as images of other formats."""
    image = tmp_path / "image"
    assert mounts.run("create", "-f", "qcow2", image, "4M").code == 0
    with tapfs.open(image, writable=True) as disk:
        disk.write(0, b"before")
    assert mounts.run("snapshot", "-c", "kept", image).code == 0
    with tapfs.open(image, writable=True) as disk:
        disk.write(0, b"after")
    directory = mounts.mount(image, "--as", "vhd,vdi")
    names = ["info.json", "disk", "snapshots/kept", "disk.vhd", "disk.vdi"]
    opened = [os.open(directory / name, os.O_RDONLY) for name in names]
    before = list(map(read_afresh, opened))
    listing = os.open(directory / "snapshots", os.O_RDONLY)
    kill_server(mounts)
    assert os.listdir(listing) == ["kept"]
    again = list(map(read_afresh, opened))
    assert again[1:] == before[1:]
    assert json.loads(again[0])["virtual_size"] == json.loads(before[0])["virtual_size"]
    for descriptor in (*opened, listing):
        os.close(descriptor)
    mounts.umount(directory)


@pytest.mark.parametrize("mounts", ["pyfuse3"], indirect=True)
def test_reads_are_proved_by_the_next_server_too(mounts: Mounts, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(random.Random(6).randbytes(MIB))
    assert mounts.run("hash", "-f", "raw", image).code == 0
    directory = mounts.mount(image, "-f", "raw", "--verify-reads")
    disk = os.open(directory / "disk", os.O_RDONLY)
    (tmp_path / "image.tapfs-hash").unlink()
    killed = kill_server(mounts)
    assert read_afresh(disk) == image.read_bytes()
    with image.open("r+b") as file:
        file.seek(600_000)
        file.write(b"spoiled")
    kill_server(mounts, before=killed)
    with pytest.raises(OSError, match="Errno 5"):
        read_afresh(disk, 600_000)
    os.close(disk)
    mounts.umount(directory)


@pytest.mark.usefixtures("root")
@native
def test_what_the_kernel_reads_by_itself(mounts: Mounts, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(random.Random(5).randbytes(2 * MIB))
    directory = mounts.directory()
    assert mounts.run("mount", "-f", "raw", "--engine", "passthrough", image, directory).code == 0
    first = os.open(directory / "disk", os.O_RDONLY)
    kill_server(mounts)
    second = os.open(directory / "disk", os.O_RDONLY)
    assert os.pread(first, MIB, MIB) == os.pread(second, MIB, MIB) == image.read_bytes()[MIB:]
    assert json.loads(mounts.run("list", "--json").out)["mounts"][0]["engine"] == "passthrough"
    os.close(first)
    os.close(second)
    mounts.umount(directory)


@native
def test_an_encrypted_image_needs_no_password_again(mounts: Mounts, tmp_path: Path) -> None:
    image, key = tmp_path / "image", tmp_path / "key"
    key.write_text("secret\n")
    assert mounts.run("create", "-f", "qcow2", "--encrypt", "--key-file", key, image, "4M").code == 0
    directory = mounts.mount(image, "--rw", "--key-file", key)
    write(directory, b"hidden")
    key.unlink()
    kill_server(mounts)
    assert (directory / "disk").read_bytes()[:6] == b"hidden"
    mounts.umount(directory)


@native
def test_partitions_are_those_of_the_start(mounts: Mounts, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(8 * MIB))
    subprocess.run(["sfdisk", "-q", image], input="2048,2048\n4096,2048\n", text=True, check=True)
    directory = mounts.mount(image, "-f", "raw", "--rw")
    second = os.open(directory / "part2", os.O_RDWR)
    os.pwrite(second, b"second", 0)
    with (directory / "disk").open("r+b") as disk:
        disk.write(bytes(512))
    kill_server(mounts)
    assert os.pread(second, 6, 0) == b"second"
    assert sorted(os.listdir(directory)) == ["disk", "info.json", "part1", "part2"]
    os.close(second)
    mounts.umount(directory)


@native
@pytest.mark.usefixtures("root", "no_new_loop_device")
@pytest.mark.parametrize("name", ["plain", "with a \\ and\ta space"])
def test_a_loop_device_over_the_disk_waits_too(mounts: Mounts, tmp_path: Path, name: str) -> None:
    """The next server looks whether a loop device shows its image, and at no file of its own mount for that."""
    image, directory = tmp_path / "image", tmp_path / name
    directory.mkdir()
    assert mounts.run("create", "-f", "qcow2", image, "16M").code == 0
    assert mounts.run("mount", "--rw", image, directory).code == 0
    shown = subprocess.run(["losetup", "-f", "--show", directory / "disk"], check=True, capture_output=True, text=True)
    device = os.open(shown.stdout.strip(), os.O_RDWR)
    subprocess.run(["losetup", "-d", shown.stdout.strip()], check=True)  # with its last user, which we are
    killed = kill_server(mounts)
    data = random.Random(8).randbytes(MIB)
    assert os.pwrite(device, data, 0) == MIB
    os.fsync(device)
    wait_for(lambda: entry(mounts)["server"] != killed)
    os.close(device)
    assert (directory / "disk").read_bytes()[:MIB] == data
    mounts.umount(directory)


@pytest.mark.usefixtures("root", "no_new_loop_device")
@pytest.mark.parametrize(
    ("mounts", "kind"), [("native", "ext4"), ("pyfuse3", "ext4"), ("native", "ntfs")], indirect=["mounts"]
)
def test_files_stay_by_the_kernel_and_by_a_program(mounts: Mounts, tmp_path: Path, content: Path, kind: str) -> None:
    image = tmp_path / "image.raw"
    make_file_system(image, kind, content)
    directory = mounts.mount(image, "-f", "raw", "--files", "--rw")
    user = os.open(directory / "new", os.O_RDWR | os.O_CREAT)
    killed = 0
    for number in range(2):
        killed = kill_server(mounts, before=killed)
        data = random.Random(number).randbytes(MIB)
        assert os.pwrite(user, data, number * MIB) == MIB
        os.fsync(user)
        assert read_afresh(user, number * MIB) == data
    wait_for(lambda: entry(mounts)["server"] != killed)
    (listed,) = json.loads(mounts.run("list", "--json").out)["mounts"]
    assert (listed["alive"], listed["file_system"]) == (True, kind)
    os.close(user)
    mounts.umount(directory)
    assert mounts.left_behind() == []
    checks: dict[str, list[str | Path]] = {"ext4": ["e2fsck", "-fn", image], "ntfs": ["ntfsfix", "-n", image]}
    subprocess.run(checks[kind], check=True, capture_output=True)
    again = mounts.mount(image, "--files")
    assert (again / "new").read_bytes() == random.Random(0).randbytes(MIB) + random.Random(1).randbytes(MIB)
    mounts.umount(again)


def test_without_its_keeper_a_server_goes_on(mounts: Mounts, tmp_path: Path) -> None:
    image = tmp_path / "image"
    assert mounts.run("create", "-f", "qcow2", image, "4M").code == 0
    directory = mounts.mount(image, "--rw")
    (listed,) = json.loads(mounts.run("list", "--json").out)["mounts"]
    keeper = listed["keeper"]
    assert is_keeper(keeper)
    os.kill(keeper, signal.SIGKILL)
    wait_for(lambda: process_start(keeper) is None)
    write(directory, b"on and on")
    (listed,) = json.loads(mounts.run("list", "--json").out)["mounts"]
    assert listed["alive"]
    mounts.umount(directory)
    assert mounts.left_behind() == []


@native
def test_without_keeper_and_server_the_kernel_ends_the_mount(mounts: Mounts, tmp_path: Path) -> None:
    """The experiment of docs/mount.md: a connection lives as long as a descriptor of it is open, in any process."""
    image = tmp_path / "image"
    assert mounts.run("create", "-f", "qcow2", image, "4M").code == 0
    directory = mounts.mount(image, "--rw")
    (listed,) = json.loads(mounts.run("list", "--json").out)["mounts"]
    os.kill(listed["keeper"], signal.SIGKILL)
    wait_for(lambda: process_start(listed["keeper"]) is None)
    write(directory, b"alone")
    os.kill(listed["pid"], signal.SIGKILL)
    wait_for(lambda: not mounts.all_processes())
    with refused(errno.ENOTCONN):
        os.stat(directory / "disk")
    assert mounts.run("umount", directory).code == 0
    assert mounts.left_behind() == []


@native
def test_a_server_that_is_killed_again_and_again_is_given_up(mounts: Mounts, tmp_path: Path) -> None:
    image = tmp_path / "image"
    assert mounts.run("create", "-f", "qcow2", image, "4M").code == 0
    directory = mounts.mount(image, "--rw")

    def is_given_up() -> bool:
        for pid in mounts.all_processes():
            if not is_keeper(pid):
                os.kill(pid, signal.SIGKILL)
        return not mounts.all_processes()

    wait_for(is_given_up)
    with pytest.raises(OSError, match="not connected"):
        os.listdir(directory)
    assert mounts.run("umount", directory).code == 0
    assert mounts.left_behind() == []


def test_an_image_that_is_gone_ends_the_mount(mounts: Mounts, tmp_path: Path) -> None:
    image = tmp_path / "image"
    assert mounts.run("create", "-f", "qcow2", image, "4M").code == 0
    directory = mounts.mount(image, "--rw")
    image.rename(tmp_path / "elsewhere")
    kill_server(mounts)
    wait_for(lambda: not mounts.all_processes())
    with pytest.raises(OSError, match="not connected"):
        os.listdir(directory)
    assert mounts.run("umount", directory).code == 0
    assert mounts.left_behind() == []


@native
def test_signals_to_the_keeper_end_the_mount_in_order(mounts: Mounts, tmp_path: Path) -> None:
    image = tmp_path / "image"
    assert mounts.run("create", "-f", "qcow2", image, "4M").code == 0
    directory = mounts.mount(image, "--rw")
    write(directory, b"kept")
    kill_server(mounts)
    os.kill(entry(mounts)["pid"], signal.SIGTERM)
    wait_for(lambda: mounts.left_behind() == [])
    assert mounts.run("check", image).code == 0
