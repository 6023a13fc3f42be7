"""qcow2 bitmaps by tapfs and by QEMU in turns: both list the same, read the same ranges, and both checks are clean."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

import tapfs as api
from tests.conftest import Ran
from tests.peer.newest_qemu import newest_qemu
from tests.peer.test_convert import qemu
from tests.peer.test_qcow2_snapshots import system_qemu

Run = Callable[..., Ran]
Tool = Callable[[str], str]
SIZE = 40 << 20

KINDS = {
    "default": "compat=1.1",
    "512": "cluster_size=512",
    "2M": "cluster_size=2097152",
    "1 bit": "refcount_bits=1,cluster_size=4096",
    "subclusters": "extended_l2=on",
    "data file": "data_file=outside",
}


@contextmanager
def served(tool: Tool, image: Path, name: str) -> Generator[str]:
    """An image served by QEMU with its bitmap, at a socket; its end waits for the lock of the image."""
    place = image.with_name("socket")
    program = str(Path(tool("qemu-img")).with_name("qemu-nbd"))
    words = [program, "-r", "-t", "-B", name, "-f", "qcow2", "-x", "", "-k", str(place), str(image)]
    with subprocess.Popen(words) as server:
        try:
            deadline = time.monotonic() + 60
            while not listens(place):
                assert server.poll() is None, "qemu-nbd has ended"
                assert time.monotonic() < deadline, "qemu-nbd does not listen"
                time.sleep(0.05)
            yield str(place)
        finally:
            server.terminate()
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()
            place.unlink(missing_ok=True)


def listens(place: Path) -> bool:
    """Whether a server listens at a socket, which has its name a moment before."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(place))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
    return True


def by_qemu(tool: Tool, image: Path, name: str) -> list[tuple[int, int]]:
    """What QEMU says that a bitmap marks: of such a map it is what is no data."""
    with served(tool, image, name) as place:
        options = f"driver=nbd,server.type=unix,server.path={place},x-dirty-bitmap=qemu:dirty-bitmap:{name}"
        found = json.loads(qemu(tool("qemu-img"), "map", "--output=json", "--image-opts", options))
    return [(each["start"], each["length"]) for each in found if not each["data"]]


def by_tapfs(image: Path, name: str) -> list[tuple[int, int]]:
    with api.read_bitmap(image, name) as found:
        return [(each.offset, each.length) for each in found.ranges]


def same(tool: Tool, tapfs: Run, image: Path, names: list[str]) -> None:
    """Both say the same of every bitmap, and find nothing wrong."""
    qemu(tool("qemu-img"), "check", "-q", image)
    assert tapfs("check", "-q", image).code == 0
    shown = json.loads(qemu(tool("qemu-img"), "info", "--output=json", image))
    listed = shown["format-specific"]["data"].get("bitmaps", [])
    assert [(each["name"], each["granularity"], "auto" in each["flags"]) for each in listed] == [
        (each.name, each.granularity, each.enabled) for each in api.bitmaps(image)
    ]
    assert [each["name"] for each in listed] == names
    for name in names:
        assert by_tapfs(image, name) == by_qemu(tool, image, name)


@pytest.mark.parametrize("tool", [system_qemu, newest_qemu])
@pytest.mark.parametrize("kind", KINDS)
def test_turns(kind: str, tool: Tool, tapfs: Run, tmp_path: Path) -> None:
    choice = random.Random(kind)
    image = tmp_path / "image"
    options = KINDS[kind].replace("outside", f"{tmp_path}/outside")
    qemu(tool("qemu-img"), "create", "-q", "-f", "qcow2", "-o", options, image, SIZE)
    assert tapfs("bitmap", "--add", image, "ours").code == 0
    qemu(tool("qemu-img"), "bitmap", "--add", "-g", "4096", image, "theirs")
    same(tool, tapfs, image, ["ours", "theirs"])
    commands = [
        word
        for _ in range(12)
        for word in ("-c", f"write {choice.randrange(SIZE // 512 - 400) * 512} {choice.choice([512, 4096, 90112])}")
    ]
    qemu(tool("qemu-io"), "-f", "qcow2", *commands, image)
    same(tool, tapfs, image, ["ours", "theirs"])
    assert tapfs("bitmap", "--add", "--disable", "-g", "1M", "--merge", "theirs", image, "wide").code == 0
    qemu(tool("qemu-img"), "bitmap", "--merge", "wide", image, "theirs")
    api.store_bitmap(image, "ours", [(0, 1), (1 << 20, 9 << 20), (SIZE - 1, 1)])
    same(tool, tapfs, image, ["ours", "theirs", "wide"])
    qemu(tool("qemu-img"), "bitmap", "--enable", image, "wide")
    assert tapfs("bitmap", "--disable", image, "theirs").code == 0
    qemu(tool("qemu-img"), "bitmap", "--clear", image, "ours")
    same(tool, tapfs, image, ["ours", "theirs", "wide"])
    assert tapfs("bitmap", "--remove", image, "ours").code == 0
    qemu(tool("qemu-img"), "bitmap", "--remove", image, "wide")
    same(tool, tapfs, image, ["theirs"])
    assert tapfs("bitmap", "--remove", image, "theirs").code == 0
    same(tool, tapfs, image, [])


@pytest.mark.parametrize("tool", [system_qemu, newest_qemu])
@pytest.mark.parametrize("kind", KINDS)
def test_writes_of_both_are_noted(kind: str, tool: Tool, tapfs: Run, tmp_path: Path) -> None:
    """Each writes in its turn; a bitmap then marks every cluster that either of them has written, and no other."""
    choice = random.Random(kind)
    image, cluster = tmp_path / "image", 65536
    options = KINDS[kind].replace("outside", f"{tmp_path}/outside")
    qemu(tool("qemu-img"), "create", "-q", "-f", "qcow2", "-o", options, image, SIZE)
    qemu(tool("qemu-io"), "-f", "qcow2", "-c", f"write 0 {SIZE // 2}", image)
    qemu(tool("qemu-img"), "bitmap", "--add", "-g", str(max(cluster, 2 << 20)), image, "wide")
    assert tapfs("bitmap", "--add", "-g", "4K", image, "fine").code == 0
    written: set[int] = set()
    for turn in range(4):
        places = [choice.randrange(SIZE // 512 - 64) * 512 for _ in range(6)]
        if turn % 2:
            qemu(tool("qemu-io"), "-f", "qcow2", *(w for at in places for w in ("-c", f"write -P 7 {at} 8k")), image)
        else:
            with api.open(image, writable=True) as disk:
                for at in places:
                    disk.write(at, b"\7" * 8192)
                disk.write(places[0], b"\7" * 512)  # in place by now
        written |= {sector for at in places for sector in range(at // 512, at // 512 + 16)}
        same(tool, tapfs, image, ["wide", "fine"])
        for name in ("wide", "fine"):
            marked = by_tapfs(image, name)
            assert all(any(at <= sector * 512 < at + length for at, length in marked) for sector in written)
    assert sum(length for _, length in by_tapfs(image, "fine")) < SIZE // 2 or kind == "2M"


def test_a_writer_that_was_killed_leaves_its_bitmaps_in_use(tapfs: Run, tmp_path: Path) -> None:
    image = tmp_path / "image"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", image, SIZE)
    for name in ("on", "off"):
        assert tapfs("bitmap", "--add", image, name).code == 0
    assert tapfs("bitmap", "--disable", image, "off").code == 0
    script = (
        "import os, sys, tapfs\nd = tapfs.open(sys.argv[1], writable=True)\nd.write(0, b'x')\nd.flush()\nos.abort()"
    )
    subprocess.run([sys.executable, "-c", script, image], check=False, capture_output=True)
    assert [(each.name, each.consistent) for each in api.bitmaps(image)] == [("on", False), ("off", True)]
    shown = json.loads(qemu("qemu-img", "info", "--output=json", image))["format-specific"]["data"]["bitmaps"]
    assert [each["flags"] for each in shown] == [["in-use", "auto"], []]
    qemu("qemu-img", "check", "-q", image)


def test_a_merge_from_another_image(tapfs: Run, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for image in (ours, theirs):
        qemu("qemu-img", "create", "-q", "-f", "qcow2", image, SIZE)
        qemu("qemu-img", "bitmap", "--add", image, "b")
    qemu("qemu-io", "-f", "qcow2", "-c", "write 3M 1M", ours)
    assert tapfs("bitmap", "--merge", "b", "-b", ours, "-F", "qcow2", theirs, "b").code == 0
    same(system_qemu, tapfs, theirs, ["b"])
    assert by_tapfs(theirs, "b") == [(3 << 20, 1 << 20)]


def test_a_snapshot_may_be_made_and_not_applied_beside_bitmaps(tapfs: Run, tmp_path: Path) -> None:
    """QEMU's own rule: a bitmap cannot follow a disk that is replaced."""
    image = tmp_path / "image"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", image, SIZE)
    qemu("qemu-img", "bitmap", "--add", image, "b")
    qemu("qemu-io", "-f", "qcow2", "-c", "write 3M 1M", image)
    assert tapfs("snapshot", "-c", "s", image).code == 0
    ran = tapfs("snapshot", "-a", "s", image)
    assert ran.code == 12
    assert "has bitmaps, which would say nothing true any more: b; remove them first" in ran.err
    qemu("qemu-img", "snapshot", "-a", "s", image, code=1)
    assert tapfs("snapshot", "-d", "s", image).code == 0
    same(system_qemu, tapfs, image, ["b"])
    assert by_tapfs(image, "b") == [(3 << 20, 1 << 20)]
