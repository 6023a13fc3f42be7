"""Copies on a file system whose files can share blocks: nothing is moved where that can be, and everything is right."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tapfs as api

Run = Callable[..., Any]
MIB = 1 << 20
DATA = 24 * MIB


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A mounted XFS, which shares blocks of 4 KiB."""
    image, mounted = tmp_path / "xfs.img", tmp_path / "xfs"
    with image.open("wb") as file:
        file.truncate(400 * MIB)
    mounted.mkdir()
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, mounted], check=True)
    try:
        yield mounted
    finally:
        subprocess.run(["umount", mounted], check=True)


def taken(folder: Path) -> int:
    """Bytes that files take there."""
    os.sync()
    status = os.statvfs(folder)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


@pytest.fixture
def raw(folder: Path) -> Path:
    """Data in two pieces with a hole between them and behind; the end is inside a block."""
    path = folder / "source.raw"
    with path.open("wb") as file:
        file.write(random.Random(1).randbytes(DATA // 2))
        file.seek(2 * DATA)
        file.write(random.Random(2).randbytes(DATA // 2 - 1000))
        file.truncate(4 * DATA + 512)
    return path


@pytest.mark.parametrize("source_format", ["raw", "qcow"])
def test_a_plain_target_shares_what_lies_in_whole_blocks(
    tapfs: Run, folder: Path, raw: Path, source_format: str
) -> None:
    source = raw
    if source_format == "qcow":
        source = folder / "source.qcow"
        assert tapfs("convert", "-f", "raw", "-O", "qcow", raw, source).code == 0
    before = taken(folder)
    target = folder / "target.raw"
    assert tapfs("convert", "-f", source_format, "-O", "raw", source, target).code == 0
    assert taken(folder) - before < MIB
    assert target.read_bytes() == raw.read_bytes()
    with target.open("r+b") as file:  # they are two files all the same
        file.write(b"changed")
    assert api.compare(raw, target, left_format="raw", right_format="raw") is not None
    assert raw.read_bytes()[:7] != b"changed"


def test_what_lies_across_blocks_is_copied(tapfs: Run, folder: Path, raw: Path) -> None:
    """A VHD has its blocks behind a sector, so they begin inside blocks of the host."""
    source, target = folder / "source.vhd", folder / "target.raw"
    assert tapfs("convert", "-f", "raw", "-O", "vhd", raw, source).code == 0
    assert tapfs("convert", "-f", "vhd", "-O", "raw", source, target).code == 0
    assert target.read_bytes()[: raw.stat().st_size] == raw.read_bytes()


def test_packed_encrypted_and_existing_disks_are_copied(tapfs: Run, folder: Path, raw: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("secret")
    packed, secret, existing = folder / "packed.qcow", folder / "secret.qcow", folder / "existing.raw"
    assert tapfs("convert", "-c", "-f", "raw", "-O", "qcow", raw, packed).code == 0
    encrypt = ("--encrypt", "--target-key-file", key)
    assert tapfs("convert", *encrypt, "-f", "raw", "-O", "qcow", raw, secret).code == 0
    existing.write_bytes(b"\xaa" * raw.stat().st_size)
    assert tapfs("convert", "-n", "-f", "qcow", "-O", "raw", packed, existing).code == 0
    assert existing.read_bytes() == raw.read_bytes()
    for source, words in ((packed, ()), (secret, ("--key-file", key))):
        target = folder / f"{source.name}.raw"
        assert tapfs("convert", *words, "-f", "qcow", "-O", "raw", source, target).code == 0
        assert target.read_bytes()[: raw.stat().st_size] == raw.read_bytes()
