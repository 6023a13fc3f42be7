"""qcow2 snapshots against a model: any requests and any edits of snapshots in any order, on every kind of image."""

from __future__ import annotations

import random

import pytest

from tapfs.driver import Operation
from tapfs.testing.model import MemoryFile
from tests.crash.test_qcow2_snapshots import Disks, done, held
from tests.qcow2_images import KINDS, audit, make, opened

SIZE = 400_000 // 512 * 512 + 512
STEPS = 40
#: Counts of 2 bits reach 3: the current disk and two snapshots.
MOST = 2


def edit(
    file: MemoryFile, what: str, name: str, current: bytearray, kept: dict[str, bytes], choice: random.Random
) -> None:
    """Create the snapshot `name`, or change one that there is; what is held then is noted."""
    if what == "create":
        if len(kept) < MOST:
            done(file, lambda each: each.create_snapshot(name, 5))
            kept[name] = bytes(current)
        return
    if kept:
        name = choice.choice(list(kept))
        if what == "apply":
            if len(kept) < MOST:
                done(file, lambda each: each.apply_snapshot(name))
                current[:] = kept[name]
        else:
            done(file, lambda each: each.delete_snapshot(name))
            del kept[name]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "refcounts of 1 bit"])
def test_snapshots_keep_what_the_disk_was(kind: str) -> None:
    choice = random.Random(kind)
    file, backing = make(kind, SIZE, 7)
    start = held(bytes(file.data), backing)
    current, kept = bytearray(start.current), dict(start.kept)
    disk = opened(file, backing)
    for number in range(STEPS):
        what = choice.choice(["write"] * 6 + ["zero", "discard", "create", "apply", "delete"])
        offset = choice.randrange(SIZE)
        if what == "write":
            data = choice.randbytes(min(choice.choice([700, 40_000]), SIZE - offset))
            disk.write(offset, data)
            current[offset : offset + len(data)] = data
        elif what in ("zero", "discard"):
            unit = disk.driver.geometry.packed_unit
            start_at = offset // unit * unit
            end = min(start_at + unit * choice.choice([1, 8]), SIZE)
            disk.zero(start_at, -(-(end - start_at) // unit) * unit, Operation(what))
            current[start_at:end] = disk.read(start_at, end - start_at)
            assert what == "discard" or not any(current[start_at:end])
        else:
            disk.flush()
            disk.flush()
            edit(file, what, f"s{number}", current, kept, choice)
            assert held(bytes(file.data), backing) == Disks(bytes(current), kept)
            found = audit(bytes(file.data))
            assert (found.corruptions, found.leaks) == ([], [])
            disk = opened(file, backing)
        assert disk.whole() == current
