"""Verified reads: every byte is proved, a spoiled leaf is an error for each read that touches it, and no other."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

import tapfs
from tapfs.disk.image import Image
from tapfs.disk.sidecar import Sidecar
from tapfs.errors import ErrorKind, ImageError
from tapfs.fuse.verified_reads import VerifiedReads
from tapfs.jobs.hashing import write_sidecar

_LEAF = 4096
_SIZE = 20 * _LEAF + 512


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Path, Image, VerifiedReads]]:
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(_SIZE - _LEAF) + bytes(_LEAF))
    with tapfs.open(path, format="raw") as image:
        write_sidecar(image, str(tmp_path / "hash"), leaf_bytes=_LEAF)
        with Sidecar(str(tmp_path / "hash")) as sidecar:
            yield path, image, VerifiedReads(image, sidecar)


def test_any_range_reads_as_the_image(disk: tuple[Path, Image, VerifiedReads]) -> None:
    path, _, reads = disk
    content = path.read_bytes()
    chance = random.Random(1)
    for _ in range(200):
        offset = chance.randrange(_SIZE)
        length = chance.randrange(1, _SIZE - offset + 1)
        assert reads.read(offset, length) == content[offset : offset + length]
        assert reads.try_read(offset, length) in (None, content[offset : offset + length])


@pytest.mark.parametrize("at", [0, 5 * _LEAF + 7, _SIZE - 1])
def test_a_spoiled_leaf_is_an_error_and_no_other(
    disk: tuple[Path, Image, VerifiedReads], at: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _, reads = disk
    monkeypatch.setattr(logging.getLogger("tapfs"), "propagate", True)
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    leaf = at // _LEAF
    for _ in range(2):
        for offset, length in ((at, 1), (leaf * _LEAF, 1), (0, _SIZE)):
            with pytest.raises(ImageError) as caught:
                (reads.try_read if offset == at else reads.read)(offset, length)
            assert (caught.value.kind, caught.value.offset) == (ErrorKind.IO, leaf * _LEAF)
    other = leaf * _LEAF - 1 if leaf else _LEAF
    assert len(reads.read(other, 1)) == 1
    assert [record.getMessage().startswith(f"{path}: bytes {leaf * _LEAF} to ") for record in caplog.records] == [True]


def test_a_sidecar_of_another_disk_is_refused(disk: tuple[Path, Image, VerifiedReads], tmp_path: Path) -> None:
    other = tmp_path / "other.raw"
    other.write_bytes(bytes(_SIZE + 512))
    with (
        tapfs.open(other, format="raw") as image,
        Sidecar(str(tmp_path / "hash")) as sidecar,
        pytest.raises(ImageError, match="of a disk of"),
    ):
        VerifiedReads(image, sidecar)
