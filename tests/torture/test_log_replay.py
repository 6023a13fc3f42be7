"""Logs of dm-log-writes, made by hand: their entries, and what replaying them makes of a disk."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from tests.laboratory.log_replay import MAGIC, Entry, Flags, entries, replay

SECTOR = 512


def sector(content: bytes) -> bytes:
    return content.ljust(SECTOR, b"\0")


def log(*written: tuple[int, int, Flags, bytes], magic: int = MAGIC) -> bytes:
    """A log of writes `(sector, sectors, flags, data)`; the data of a mark is its text."""
    made = sector(struct.pack("<QQQI", magic, 1, len(written), SECTOR))
    for at, count, flags, data in written:
        text = data if flags & Flags.MARK else b""
        made += sector(struct.pack("<QQQQ", at, count, flags, len(text)) + text)
        made += b"" if text else data
    return made


def opened(path: Path, content: bytes) -> int:
    path.write_bytes(content)
    return os.open(path, os.O_RDWR)


def test_writes_discards_and_marks(tmp_path: Path) -> None:
    plain = Flags(0)
    source = opened(
        tmp_path / "log",
        log(
            (2, 2, plain, b"a" * 1024),
            (0, 0, Flags.MARK, b"made\n\0"),
            (0, 1, Flags.FUA, b"b" * 512),
            (3, 1, Flags.DISCARD, b""),
            (0, 0, Flags.FLUSH, b""),
        ),
    )
    found = list(entries(source))
    assert found[0] == Entry(1024, 1024, plain, "", 2 * SECTOR)
    assert [entry.mark for entry in found] == ["", "made", "", "", ""]
    assert [entry.flags for entry in found[2:]] == [Flags.FUA, Flags.DISCARD, Flags.FLUSH]
    target = opened(tmp_path / "disk", b"x" * 4 * SECTOR)
    replay(source, found[0], target)
    assert (tmp_path / "disk").read_bytes() == b"x" * 1024 + b"a" * 1024
    for entry in found[1:]:
        replay(source, entry, target)
    assert (tmp_path / "disk").read_bytes() == b"b" * 512 + b"x" * 512 + b"a" * 512 + bytes(512)
    os.close(source)
    os.close(target)


def test_another_file_is_no_log(tmp_path: Path) -> None:
    source = opened(tmp_path / "log", log(magic=1))
    with pytest.raises(ValueError, match="no log"):
        list(entries(source))
    os.close(source)
