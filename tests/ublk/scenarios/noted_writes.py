"""Writes to the disk of an image, each fsync that returned noted, and what the image may hold after a crash.

A disk is a block device of tapfs or a file of its FUSE mount. Each sector holds the number of the write that it is of.
"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import tapfs
from tests.laboratory.commands import attempt_tapfs
from tests.laboratory.commands import tapfs as command
from tests.ublk.scenarios.block_devices import BlockDevices

SECTOR, BLOCK = 512, 4096
BLOCKS = 256
_MOUNTS = "/run/disks"


@dataclass(frozen=True)
class Kind:
    """An image: its format, options of `create`, and whether its disk is a file of a mount or a block device."""

    format: str
    options: tuple[str, ...] = ()
    mounted: bool = False

    @property
    def name(self) -> str:
        """A name for a file, and for marks."""
        return f"{self.format}-mounted" if self.mounted else self.format

    def create(self, image: str) -> None:
        """Make the image."""
        command("create", "-f", self.format, *self.options, image, str(BLOCKS * BLOCK))

    @contextmanager
    def disk(self, host: BlockDevices, image: str, *words: str) -> Generator[str]:
        """The disk of the image, to be written. It is taken away with or without errors of its own."""
        mount = f"{_MOUNTS}/{self.name}"
        if self.mounted:
            os.makedirs(mount, exist_ok=True)
            command("mount", "--rw", "-f", self.format, *words, image, mount)
        disk = f"{mount}/disk" if self.mounted else host.attach("-f", self.format, *words, image)
        try:
            yield disk
        finally:
            end = ("umount", mount) if self.mounted else ("detach", "--ublk", disk)
            if attempt_tapfs(*end).returncode != 0:
                attempt_tapfs(*end, "--force")


@dataclass
class Written:
    """Each write of each block by its number, how many there were at the last fsync that returned, and at each mark."""

    blocks: dict[int, list[int]] = field(default_factory=dict[int, list[int]])
    count: int = 0
    acknowledged: int = 0
    marks: dict[str, int] = field(default_factory=dict[str, int])

    def write(self, disk: int, choice: random.Random, writes: int) -> None:
        """So many writes, and an fsync. Raises OSError."""
        for _ in range(writes):
            first, length = choice.randrange(BLOCKS - 8), choice.choice([1, 1, 8])
            self.count += 1
            for block in range(first, first + length):
                self.blocks.setdefault(block, []).append(self.count)
            os.pwrite(disk, _bytes(self.count) * (length * BLOCK // SECTOR), first * BLOCK)
        os.fsync(disk)
        self.acknowledged = self.count

    def write_all(self, disk: int) -> None:
        """Write every block at once, and an fsync. Raises OSError."""
        self.count += 1
        self.blocks = {block: [self.count] for block in range(BLOCKS)}
        os.pwrite(disk, _bytes(self.count) * (BLOCKS * BLOCK // SECTOR), 0)
        os.fsync(disk)
        self.acknowledged = self.count

    def look(self, path: Path, kind: Kind, acknowledged: int) -> None:
        """See that an image checks clean, and holds all of so many writes, or what was written later."""
        report = tapfs.check(path, format=kind.format)
        assert not report.corruptions, report.findings[:4]
        with tapfs.open(path, format=kind.format) as disk:
            content = disk.read(0, BLOCKS * BLOCK)
        for at in range(0, len(content), SECTOR):
            sector = content[at : at + SECTOR]
            number = int.from_bytes(sector[:8], "little")
            assert sector == _bytes(number), f"the sector at {at:#x} of {kind.name} is torn"
            allowed = self._allowed(at // BLOCK, acknowledged)
            assert number in allowed, f"the sector at {at:#x} of {kind.name} holds write {number}, not one of {allowed}"

    def _allowed(self, block: int, acknowledged: int) -> set[int]:
        """The numbers that a sector of the block may hold after a crash with so many writes acknowledged."""
        numbers = self.blocks.get(block, [])
        sure = max((number for number in numbers if number <= acknowledged), default=0)
        return {sure, *(number for number in numbers if number > acknowledged)}


def _bytes(number: int) -> bytes:
    return struct.pack("<Q", number) * (SECTOR // 8)
