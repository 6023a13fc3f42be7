"""qcow2 snapshot tables that are damaged or say too little: no repair takes what they hold for free.

These stand for QEMU's cases 080 and 261: limits of the table, entries without their sizes, too much extra data.
"""

from __future__ import annotations

import json
import random
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tapfs.driver import OpenRequest
from tapfs.findings import CheckReport
from tapfs.formats.qcow2 import FORMAT
from tapfs.testing.model import MemoryFile
from tests.conftest import Ran
from tests.qcow2_images import Fields, audit, by_hand, make

Run = Callable[..., Ran]
SIZE = 600_000 // 512 * 512
ENTRY = struct.Struct(">QIHHIIQII")


def image() -> tuple[MemoryFile, bytes]:
    """An image with the snapshot "before", and what that reads as."""
    file, backing = make("snapshot", SIZE, 3)
    return file, by_hand(bytes(file.data), backing, snapshot=0)


def report_of(file: MemoryFile) -> CheckReport:
    return FORMAT.open(file, OpenRequest(lenient=True)).check()


def repaired(file: MemoryFile) -> None:
    file.apply_all(list(FORMAT.open(file, OpenRequest(lenient=True)).repair()))


def damaged_table(data: bytearray, how: str) -> None:
    """Have nobody be able to read the table, or the L1 table of the snapshot in it."""
    at = Fields(bytes(data)).snapshots_at
    if how == "too much extra data":
        data[at + 36 : at + 40] = (2000).to_bytes(4, "big")
    elif how == "past the end":
        data[64:72] = (1 << 40).to_bytes(8, "big")
    elif how == "not on a cluster":
        data[71] |= 8
    elif how == "a name without end":
        data[at + 14 : at + 16] = b"\xff\xff"
        del data[at + 4096 :]
    elif how == "L1 table of too many entries":
        data[at + 8 : at + 12] = b"\xff\xff\xff\xff"
    else:
        data[at : at + 8] = (1 << 40).to_bytes(8, "big")


DAMAGE = [
    *("too much extra data", "past the end", "not on a cluster", "a name without end"),
    *("L1 table of too many entries", "L1 table past the end"),
]


@pytest.mark.parametrize("how", DAMAGE)
def test_a_repair_frees_nothing_of_a_snapshot_that_it_cannot_see(how: str) -> None:
    file, kept = image()
    whole = bytes(file.data)
    damaged_table(file.data, how)
    assert report_of(file).corruptions > 0
    assert report_of(file).leaks == 0 or how == "L1 table past the end"
    damaged = bytes(file.data)
    repaired(file)
    assert report_of(file).corruptions > 0
    # Whoever mends the table by other means finds all of the snapshot.
    changed = {at for at in range(len(damaged)) if damaged[at] != file.data[at]}
    restored = bytearray(whole)
    for at in changed:
        restored[at] = file.data[at]
    assert by_hand(bytes(restored), snapshot=0) == kept
    found = audit(bytes(restored))
    assert (found.corruptions, found.leaks) == ([], [])


def test_an_image_that_was_not_closed_stays_marked_while_a_snapshot_cannot_be_seen() -> None:
    file, _ = image()
    file.data[79] |= 1
    damaged_table(file.data, "too much extra data")
    repaired(file)
    assert file.data[79] & 1


def without_sizes(file: MemoryFile) -> None:
    """Have the entry of the one snapshot lack its extra data."""
    at = Fields(bytes(file.data)).snapshots_at
    fields = ENTRY.unpack_from(file.data, at)
    rest = bytes(file.data[at + ENTRY.size + fields[8] :][: fields[2] + fields[3]])
    entry = ENTRY.pack(*fields[:8], 0) + rest
    file.data[at : at + 128] = entry.ljust(128, b"\0")


def test_an_entry_without_sizes_is_an_error_of_version_3_which_a_repair_mends() -> None:
    file, kept = image()
    without_sizes(file)
    (finding,) = report_of(file).findings
    assert finding.message == "the entry of snapshot before does not say the size of its disk"
    current = by_hand(bytes(file.data))
    file = MemoryFile(bytes(file.data))
    repaired(file)
    assert report_of(file).findings == []
    choice = random.Random(1)
    for epoch in range(len(file.epochs)):
        for _ in range(4):
            left = MemoryFile(file.crashed(epoch, choice))
            assert by_hand(bytes(left.data)) == current
            assert by_hand(bytes(left.data), snapshot=0) == kept
            repaired(left)
            assert report_of(left).findings == []
            found = audit(bytes(left.data))
            assert (found.corruptions, found.leaks) == ([], [])


def test_both_checks_count_an_entry_without_sizes(tapfs: Run, tmp_path: Path) -> None:
    file, _ = image()
    without_sizes(file)
    path = tmp_path / "image"
    path.write_bytes(file.data)
    theirs = subprocess.run(["qemu-img", "check", "--output=json", path], capture_output=True, text=True, check=False)
    assert (theirs.returncode, json.loads(theirs.stdout)["corruptions"]) == (2, 1)
    assert tapfs("check", path).code == 2
    assert tapfs("repair", path).code == 0
    subprocess.run(["qemu-img", "check", "-q", path], check=True)
    listed = subprocess.run(["qemu-img", "snapshot", "-l", path], capture_output=True, text=True, check=True).stdout
    assert "before" in listed


def test_thousands_of_snapshots_with_one_l1_table_are_counted_quickly() -> None:
    file, _ = image()
    fields = Fields(bytes(file.data))
    entry = bytes(file.data[fields.snapshots_at : fields.snapshots_at + 64])
    count = 5000
    file.data.extend(bytes(-len(file.data) % fields.cluster))
    file.data[60:64] = count.to_bytes(4, "big")
    file.data[64:72] = len(file.data).to_bytes(8, "big")
    file.data.extend(entry * count)
    report = report_of(file)
    assert report.corruptions > 0
    assert any(f"{count + 1} references" in each.message for each in report.findings)
