"""`tapfs compare` finds what `qemu-img compare` finds."""

from __future__ import annotations

import random
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.peer.test_convert import qemu

Run = Callable[..., Any]


@pytest.mark.parametrize("seed", range(12))
def test_the_first_difference(tapfs: Run, sample: Path, tmp_path: Path, seed: int) -> None:
    """A few sectors of a qcow copy are overwritten: same exit code; QEMU counts in sectors."""
    chance = random.Random(seed)
    image = tmp_path / "a.qcow"
    qemu("qemu-img", "convert", "-f", "raw", "-O", "qcow", sample, image)
    size = sample.stat().st_size
    commands = []
    for _ in range(seed % 4):
        commands += ["-c", f"write -P {chance.choice((0, 120))} {512 * chance.randrange(size // 512)} 512"]
    if commands:
        qemu("qemu-io", "-f", "qcow", *commands, image)
    theirs = subprocess.run(
        ["qemu-img", "compare", "-f", "raw", "-F", "qcow", sample, image], capture_output=True, text=True, check=False
    )
    ours = tapfs("compare", "-f", "raw", "-F", "qcow", sample, image)
    assert ours.code == theirs.returncode
    found = re.search(r"mismatch at offset (\d+)", theirs.stdout)
    if found is not None:
        mine = re.search(r"first at byte (\d+)", ours.out)
        assert mine is not None
        assert int(mine.group(1)) // 512 == int(found.group(1)) // 512


@pytest.mark.parametrize("tail", [b"", bytes(4096), bytes(2 << 20), bytes(8192) + b"x" * 512])
def test_disks_of_different_sizes(tapfs: Run, sample: Path, tmp_path: Path, tail: bytes) -> None:
    other = tmp_path / "b.raw"
    other.write_bytes(sample.read_bytes() + tail)
    for strict in ((), ("-s",)):
        for pair in ((sample, other), (other, sample)):
            theirs = subprocess.run(
                ["qemu-img", "compare", *(("-s",) if strict and tail else ()), "-f", "raw", "-F", "raw", *pair],
                capture_output=True,
                check=False,
            )
            assert tapfs("compare", *strict, "-f", "raw", "-F", "raw", *pair).code == theirs.returncode
