"""Power fails while the real engine writes: the image stays sound, what was acknowledged is there.

The order of writes is what strace saw, not what we think.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

import tapfs
from tests.crash.recorded import SECTOR, Event, Mark, crashes, record

SIZE = 6 << 20
#: Kind: format, options of create, whether it is over a parent.
#: Formats whose parents are of the same format, for they know a parent by what such an image says that it is.
OF_THEIR_OWN = {"vmdk", "vhdx", "vdi"}
#: Kinds that have two seeds.
TWICE = {"qemu layout", "blktap layout", "overlay", "blktap overlay"}
KINDS: dict[str, tuple[str, dict[str, str], bool]] = {
    "qemu layout": ("qcow", {}, False),
    "blktap layout": ("qcow", {"blktap": "on"}, False),
    "overlay": ("qcow", {}, True),
    "blktap overlay": ("qcow", {"blktap": "on"}, True),
    "qcow2": ("qcow2", {}, True),
    "qcow2 with subclusters": ("qcow2", {"extended_l2": "on", "cluster_size": "16384"}, True),
    "vhd": ("vhd", {"block_size": "65536"}, False),
    "differencing vhd": ("vhd", {"block_size": "65536"}, True),
    "vmdk": ("vmdk", {}, False),
    "delta vmdk": ("vmdk", {"zeroed_grain": "on"}, True),
    "vhdx": ("vhdx", {"block_size": "1M"}, False),
    "differencing vhdx": ("vhdx", {"block_size": "1M"}, True),
    "vdi": ("vdi", {}, False),
}


class Allowed:
    """For each sector the bytes that it may hold after a crash: a byte stands for the sector."""

    def __init__(self, start: list[int]) -> None:
        self.sectors = [{byte} for byte in start]
        self._unflushed: dict[int, set[int]] = {}
        self._followed = 0

    def follow(self, events: list[Event], happened: int) -> None:
        """Take account of the steps announced in the first `happened` events; those of an earlier call are known."""
        for event in events[self._followed : happened]:
            if isinstance(event, Mark):
                self._step(event.text)
        self._followed = max(self._followed, happened)

    def _step(self, text: str) -> None:
        if text == "acknowledged":
            for number, newest in self._unflushed.items():
                self.sectors[number] = newest
            self._unflushed = {}
            return
        kind, offset, length, byte = text.split()
        if kind == "flush":
            return
        for number in range(int(offset) // SECTOR, (int(offset) + int(length)) // SECTOR):
            after = {int(byte)} if kind == "write" else {0}
            if kind == "discard":
                after |= self._unflushed.get(number) or self.sectors[number]
            self._unflushed[number] = after
            self.sectors[number] = self.sectors[number] | after


def of_sectors(bytes_of_sectors: bytes) -> bytes:
    """The disk whose sectors hold these bytes, one byte a sector, over and over."""
    return b"".join(bytes([byte]) * SECTOR for byte in bytes_of_sectors)


@pytest.mark.parametrize(
    ("kind", "seed"),
    [(kind, seed) for kind in KINDS for seed in (1, 2) if seed == 1 or kind in TWICE],
)
def test_a_crash_leaves_a_sound_image_with_all_that_was_acknowledged(tmp_path: Path, kind: str, seed: int) -> None:
    format_name, options, over_parent = KINDS[kind]
    image, marks = tmp_path / "image", tmp_path / "marks"
    start = [0] * (SIZE // SECTOR)
    backing = None
    if over_parent:
        backing = str(tmp_path / "parent.raw")
        start = [251 - number % 7 for number in range(SIZE // SECTOR)]
        Path(backing).write_bytes(of_sectors(bytes(start)))
        if format_name in OF_THEIR_OWN:
            raw, backing = backing, str(tmp_path / "parent")
            tapfs.convert(raw, backing, format="raw", target_format=format_name)
    tapfs.create(str(image), format_name, SIZE, backing=backing, options=options)
    content = image.read_bytes()

    program = str(Path(__file__).with_name("writer.py"))
    requests = 50 if format_name in OF_THEIR_OWN else 120
    words = [sys.executable, program, str(image), str(marks), str(seed), str(requests), format_name]
    events = record(words, image, marks, tmp_path / "strace.log")
    generator = random.Random(seed)
    crashed = tmp_path / "crashed"
    count, allowed = 0, Allowed(start)
    for happened, left in crashes(content, events, generator, tries=3):
        crashed.write_bytes(left)
        report = tapfs.check(crashed, format=format_name)
        assert not report.corruptions, (happened, report.findings)
        allowed.follow(events, happened)
        with tapfs.open(crashed, format=format_name) as disk:
            seen = disk.read(0, SIZE)
        firsts = seen[::SECTOR]
        for number, (byte, values) in enumerate(zip(firsts, allowed.sectors, strict=True)):
            assert byte in values, (happened, number, values)
        assert seen == of_sectors(firsts), (happened, "a sector is torn")
        count += 1
    assert count > 20
