"""Steps of scrubbing: together they cover the disk, and what is spoiled or unreadable is named."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import tapfs
from tapfs.disk.image import Image
from tapfs.errors import ErrorKind, ImageError
from tapfs.jobs.hashing import write_sidecar
from tapfs.serving import scrubbing

_SIZE = (9 << 20) + 512


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.write(os.urandom(5 << 20))
        file.truncate(_SIZE)
        file.seek(8 << 20)
        file.write(b"end")
    return path


def _scrubbed(image: Image, sidecar: str | None = None) -> dict[str, Any]:
    total: dict[str, Any] = {"differ": [], "unreadable": [], "read": 0, "steps": 0}
    offset = 0
    while offset < image.size:
        said = scrubbing.scrub_step(image, offset, sidecar)
        assert offset < said["until"] <= image.size
        offset = said["until"]
        for key in ("differ", "unreadable", "read"):
            total[key] += said[key]
        total.update({key: said[key] for key in ("sidecar", "untouched")})
        total["steps"] += 1
    return total


def test_the_steps_cover_the_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrubbing, "_STEP_BYTES", 2 << 20)
    with tapfs.open(path, format="raw") as image:
        assert _scrubbed(image)["sidecar"] is None
        write_sidecar(image, f"{path}.tapfs-hash")
        found = _scrubbed(image)
        assert found["steps"] >= 3
        assert (found["differ"], found["sidecar"], found["untouched"]) == ([], f"{path}.tapfs-hash", True)
        assert (5 << 20) < found["read"] < (6 << 20)
        with path.open("r+b") as file:
            for at in (0, 4 << 20, 6 << 20, _SIZE - 1):
                file.seek(at)
                file.write(b"spoiled"[: _SIZE - at])
        found = _scrubbed(image)
        assert [each.offset for each in found["differ"]] == [0, 4 << 20, 6 << 20, 9 << 20]
        assert found["untouched"] is False


def test_what_cannot_be_read_is_named_and_the_rest_is_compared(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tapfs.open(path, format="raw") as image:
        write_sidecar(image, f"{path}.tapfs-hash")
        read_ranges, read = Image.read_ranges, Image.read
        broken = ImageError(ErrorKind.IO, "broken", path=str(path), op="read")

        def of_ranges(self: Image, ranges: Any, buffer: Any) -> None:
            if any(offset <= 3 << 20 < offset + length for offset, length in ranges):
                raise broken
            read_ranges(self, ranges, buffer)

        def of_one(self: Image, offset: int, length: int) -> bytes:
            if offset <= 3 << 20 < offset + length:
                raise broken
            return read(self, offset, length)

        monkeypatch.setattr(Image, "read_ranges", of_ranges)
        monkeypatch.setattr(Image, "read", of_one)
        found = _scrubbed(image)
    assert found["differ"] == [(3 << 20, 65536)]
    assert [each[:2] for each in found["unreadable"]] == [(3 << 20, 65536)]


def test_a_sidecar_of_another_disk_is_an_error(path: Path, tmp_path: Path) -> None:
    with tapfs.open(path, format="raw") as image:
        write_sidecar(image, str(tmp_path / "hash"))
    os.truncate(path, _SIZE + 512)
    with tapfs.open(path, format="raw") as image, pytest.raises(ImageError, match="of a disk of"):
        scrubbing.scrub_step(image, 0, str(tmp_path / "hash"))
