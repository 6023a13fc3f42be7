"""`tapfs changes`: what the images above a snapshot hold, merged, in a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tapfs as api
from tapfs.errors import CODES, ErrorKind

Run = Callable[..., Any]
SIZE, CLUSTER = 1 << 20, 65536


def test_what_was_written_since_a_snapshot(tapfs: Run, tmp_path: Path) -> None:
    names = [str(tmp_path / name) for name in ("monday", "tuesday", "wednesday")]
    written = [[(0, b"m")], [(CLUSTER, b"t"), (2 * CLUSTER, bytes(1)), (5 * CLUSTER, b"t")], [(6 * CLUSTER, b"w")]]
    for number, name in enumerate(names):
        backing = (names[number - 1], "qcow2") if number else (None, None)
        api.create(name, "qcow2", SIZE, backing=backing[0], backing_format=backing[1])
        with api.open(name, format="qcow2", writable=True) as image:
            for offset, byte in written[number]:
                image.write_zeroes(offset, CLUSTER) if byte == b"\0" else image.write(offset, byte * CLUSTER)
    since_monday = [(CLUSTER, CLUSTER, False), (2 * CLUSTER, CLUSTER, True), (5 * CLUSTER, 2 * CLUSTER, False)]
    for since, expected in ((names[0], since_monday), (None, [(6 * CLUSTER, CLUSTER, False)])):
        words = ("changes", names[2], "--json", *(() if since is None else ("--since", since)))
        found = json.loads(tapfs(*words).out)
        assert [tuple(extent.values()) for extent in found["extents"]] == expected
        assert found["size"] == SIZE
        assert found["data_bytes"] == sum(length for _, length, zero in expected if not zero)
        assert found["zero_bytes"] == sum(length for _, length, zero in expected if zero)
    lines = tapfs("changes", names[2], "--since", "monday").out.splitlines()
    assert [line.split() for line in lines[1:3]] == [["0x10000", "0x10000", "data"], ["0x20000", "0x10000", "zeros"]]
    assert lines[-1] == "192 KiB of data and 64 KiB of zeros can have changed"


def test_what_is_no_snapshot_of_it_is_refused(tapfs: Run, tmp_path: Path) -> None:
    alone = str(tmp_path / "alone")
    api.create(alone, "qcow2", SIZE)
    assert tapfs("changes", alone).code == CODES[ErrorKind.UNSUPPORTED].exit_code
    over = str(tmp_path / "over")
    api.create(over, "qcow2", SIZE, backing=alone, backing_format="qcow2")
    code, _, err = tapfs("changes", over, "--since", over)
    assert code == CODES[ErrorKind.INVALID_ARGUMENT].exit_code
    assert "is not in its backing chain" in err
