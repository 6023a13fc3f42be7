"""EWF images that ewfacquire wrote: tapfs reads the bytes of the disk from them."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

import tapfs
from tapfs.jobs.compare import compare


@pytest.mark.parametrize(
    ("words", "suffix"),
    [
        (["-f", "encase6", "-c", "fast", "-d", "sha1"], "E01"),
        (["-f", "encase5", "-c", "none", "-S", "1048576"], "E01"),
        (["-f", "encase1", "-c", "best"], "E01"),
        (["-f", "ftk", "-c", "empty-block"], "E01"),
        (["-f", "linen6", "-c", "best", "-b", "256"], "E01"),
        (["-f", "smart", "-c", "best"], "s01"),
        (["-f", "ewfx", "-c", "none"], "e01"),
    ],
    ids=lambda each: each[1] if isinstance(each, list) else None,
)
def test_ewfacquire_to_tapfs(tmp_path: Path, words: list[str], suffix: str) -> None:
    choice = random.Random(7)
    disk = bytearray(3 << 20) + b"tail" * 128 * 11
    disk[100_000:200_000] = choice.randbytes(100_000)
    disk[1 << 20 : (1 << 20) + 300_000] = b"some text " * 30_000
    raw = tmp_path / "disk.raw"
    raw.write_bytes(disk)
    subprocess.run(
        ["ewfacquire", "-u", "-q", "-t", tmp_path / "made", *words, raw], check=True, capture_output=True, timeout=60
    )
    path = tmp_path / f"made.{suffix}"
    with tapfs.open(path) as image, tapfs.open(raw, format="raw") as expected:
        assert image.format_name == "ewf"
        assert compare(image, expected, strict=True) is None
    report = tapfs.check(path)
    assert (report.corruptions, report.findings) == (0, [])
