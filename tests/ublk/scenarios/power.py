"""Power fails under a file system with images on it: a log of dm-log-writes, replayed to its flushes and marks.

The images are written through block devices of tapfs, and each fsync that returned is a mark in the log. After a crash
the file system is mounted, which replays its journal. The image has to check clean, and every sector to hold what the
last mark before the crash acknowledged, or something that was written later.
"""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import tapfs
from tests.laboratory import log_replay
from tests.laboratory.commands import run, say
from tests.laboratory.commands import tapfs as command
from tests.laboratory.log_replay import Flags
from tests.laboratory.scenario import scenario
from tests.ublk.scenarios.block_devices import BlockDevices

MEMORY = Path("/images/power")
MOUNT = "/run/mounted"
#: The first device of the device mapper; there is no udev that would name it.
DEVICE = "/dev/dm-0"
SECTOR, BLOCK = 512, 4096
BLOCKS = 256
#: Kind of image: what `create` is told.
KINDS = {"qcow2": ["-f", "qcow2"], "vmdk": ["-f", "vmdk"], "vhd": ["-f", "vhd", "-o", "block_size=65536"]}
ROUNDS, WRITES = 3, 6


@dataclass
class Written:
    """Each write of each block by its number in the run, and how many there were at each mark."""

    blocks: dict[int, list[int]] = field(default_factory=dict[int, list[int]])
    count: int = 0
    marks: dict[str, int] = field(default_factory=dict[str, int])

    def allowed(self, block: int, acknowledged: int) -> set[int]:
        """The numbers that a sector of the block may hold after a crash with so many writes acknowledged."""
        numbers = self.blocks.get(block, [])
        sure = max((number for number in numbers if number <= acknowledged), default=0)
        return {sure, *(number for number in numbers if number > acknowledged)}


def _bytes(number: int) -> bytes:
    return struct.pack("<Q", number) * (SECTOR // 8)


@contextmanager
def _loop(path: Path) -> Iterator[str]:
    device = run("losetup", "--find", "--show", str(path))
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


@contextmanager
def _mounted(device: str, file_system: str) -> Iterator[None]:
    os.makedirs(MOUNT, exist_ok=True)
    run("mount", "-t", file_system, device, MOUNT)
    try:
        yield
    finally:
        run("umount", MOUNT)


def _write(host: BlockDevices, kind: str, choice: random.Random) -> Written:
    """Write an image through a block device; each fsync that returned is marked in the log."""
    image, written = f"{MOUNT}/{kind}", Written()
    command("create", *KINDS[kind], image, str(BLOCKS * BLOCK))
    _mark(written, f"{kind} made")
    device = host.attach(image)
    disk = os.open(device, os.O_RDWR)
    try:
        for turn in range(ROUNDS):
            for _ in range(WRITES):
                first, length = choice.randrange(BLOCKS - 8), choice.choice([1, 1, 8])
                written.count += 1
                os.pwrite(disk, _bytes(written.count) * (length * BLOCK // SECTOR), first * BLOCK)
                for block in range(first, first + length):
                    written.blocks.setdefault(block, []).append(written.count)
            os.fsync(disk)
            _mark(written, f"{kind} {turn}")
    finally:
        os.close(disk)
    host.detach(device)
    return written


def _mark(written: Written, name: str) -> None:
    run("dmsetup", "message", "power", "0", "mark", name.replace(" ", "-"))
    written.marks[name.replace(" ", "-")] = written.count


def _look(kind: str, written: Written, acknowledged: int | None) -> None:
    """An image after a crash; `acknowledged` None: not even its making was."""
    path = Path(MOUNT, kind)
    if acknowledged is None and not path.exists():
        return
    report = tapfs.check(path, format=kind)
    assert not report.corruptions, report.findings[:4]
    with tapfs.open(path, format=kind) as disk:
        content = disk.read(0, disk.size)
    for at in range(0, len(content), SECTOR):
        sector = content[at : at + SECTOR]
        number = int.from_bytes(sector[:8], "little")
        assert sector == _bytes(number), f"the sector at {at:#x} of {kind} is torn"
        allowed = written.allowed(at // BLOCK, acknowledged or 0)
        assert number in allowed, f"the sector at {at:#x} of {kind} holds write {number}, not one of {allowed}"


def _crash_everywhere(
    base: Path, log: Path, file_system: str, written: dict[str, Written], most: int, choice: random.Random
) -> int:
    """Replay the log to its flushes and marks, at most so many of them drawn at random, and look at each."""
    source, target = os.open(log, os.O_RDONLY), os.open(base, os.O_RDWR)
    found = list(log_replay.entries(source))
    ready = next(at for at, entry in enumerate(found) if entry.mark == "ready")
    points = [
        at for at, entry in enumerate(found) if at > ready and entry.flags & (Flags.FLUSH | Flags.FUA | Flags.MARK)
    ]
    chosen = set(choice.sample(points, min(most, len(points)))) | {points[-1]}
    acknowledged: dict[str, int | None] = dict.fromkeys(written)
    crashed = base.with_name("crashed")
    for at, entry in enumerate(found):
        log_replay.replay(source, entry, target)
        for kind, each in written.items():
            if entry.mark in each.marks:
                acknowledged[kind] = each.marks[entry.mark]
        if at in chosen:
            subprocess.run(["cp", "--sparse=always", base, crashed], check=True)
            with _loop(crashed) as device, _mounted(device, file_system):
                for kind, each in written.items():
                    _look(kind, each, acknowledged[kind])
    os.close(source)
    os.close(target)
    say(f"{len(found)} entries, {len(points)} flushes and marks, {len(chosen)} looked at")
    return len(chosen)


def _power_fails(host: BlockDevices, file_system: str, make: list[str], mebibytes: int, most: int) -> str:
    choice = random.Random(mebibytes)
    shutil.rmtree(MEMORY, ignore_errors=True)
    MEMORY.mkdir()
    data, log = MEMORY / "data", MEMORY / "log"
    for path, size in ((data, mebibytes << 20), (log, 256 << 20)):
        with path.open("wb") as file:
            file.truncate(size)
    try:
        with _loop(data) as lower, _loop(log) as record:
            sectors = (mebibytes << 20) // SECTOR
            run("dmsetup", "create", "power", "--noudevsync", "--table", f"0 {sectors} log-writes {lower} {record}")
            try:
                run(*make, DEVICE)
                run("dmsetup", "message", "power", "0", "mark", "ready")
                with _mounted(DEVICE, file_system):
                    written = {kind: _write(host, kind, choice) for kind in KINDS}
            finally:
                run("dmsetup", "remove", "--noudevsync", "power")
        base = MEMORY / "base"
        with base.open("wb") as file:
            file.truncate(mebibytes << 20)
        data.unlink()
        count = _crash_everywhere(base, log, file_system, written, most, choice)
    finally:
        shutil.rmtree(MEMORY, ignore_errors=True)
    return f"{count} crash points"


@scenario(120)
def log_writes(host: BlockDevices) -> str:
    """Images on ext4: at every flush and mark, or at 30 of them, nothing that was acknowledged is lost."""
    return _power_fails(host, "ext4", ["mkfs.ext4", "-q", "-E", "nodiscard"], 48, 30)
