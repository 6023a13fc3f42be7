"""Damage told as files: what a check cannot map, or a sidecar finds to differ, has the names of its files."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

import tapfs as api
from tests.conftest import Ran
from tests.filled_file_systems import run

Run = Callable[..., Ran]

_START, _SIZE = 1 << 20, 17 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A qcow2 with an MBR, an ext4 in partition 1, and in there /folder/victim among others."""
    folder = tmp_path / "files"
    (folder / "folder").mkdir(parents=True)
    (folder / "folder" / "victim").write_bytes(os.urandom(200 << 10))
    (folder / "other").write_bytes(os.urandom(200 << 10))
    raw = tmp_path / "disk.raw"
    run("mke2fs", "-qF", "-t", "ext4", "-b", "4096", "-E", f"offset={_START}", "-d", folder, raw, "16M")
    os.truncate(raw, _SIZE)
    with raw.open("r+b") as file:
        file.seek(446)
        file.write(struct.pack("<B3xB3xII", 0, 0x83, _START // 512, (_SIZE - _START) // 512))
        file.seek(510)
        file.write(b"\x55\xaa")
    path = tmp_path / "disk.qcow2"
    api.convert(raw, path, format="raw", target_format="qcow2", options={"cluster_size": "4096"})
    return path


def _place_of(raw: Path, content: bytes) -> int:
    return raw.read_bytes().index(content[:4096])


def _break_entry(image: Path, offset: int) -> None:
    """Have the entry of the cluster at an offset of the disk lead behind the end of the file."""
    with api.open(image) as disk:
        host = next(each.host_offset for each in disk.extents(offset, 4096))
    assert host is not None
    content = image.read_bytes()
    entry = content.index(struct.pack(">Q", 1 << 63 | host))
    with image.open("r+b") as file:
        file.seek(entry)
        file.write(struct.pack(">Q", 1 << 63 | 1 << 40))


def test_a_cluster_that_cannot_be_mapped_is_told_as_its_file(tapfs: Run, image: Path, tmp_path: Path) -> None:
    victim = _place_of(tmp_path / "disk.raw", (tmp_path / "files/folder/victim").read_bytes())
    assert tapfs("check", "--files", image).out.splitlines()[1:] == []
    _break_entry(image, victim + 8192)
    ran = tapfs("check", "--json", "--files", image)
    assert ran.code == 2
    assert json.loads(ran.out)["files"] == [
        {
            "offset": victim + 8192,
            "length": 4096,
            "partition": 1,
            "file_system": "ext4",
            "part": "data",
            "number": json.loads(ran.out)["files"][0]["number"],
            "path": "/folder/victim",
        }
    ]
    assert "/folder/victim (data)" in tapfs("check", "--files", image).out


def test_ranges_that_are_named_are_told_wherever_they_lie(tapfs: Run, image: Path, tmp_path: Path) -> None:
    other = _place_of(tmp_path / "disk.raw", (tmp_path / "files/other").read_bytes())
    ran = tapfs("check", "--json", "--files", "--range", "0:512", "--range", f"{other}:1", "--range", "16M:1T", image)
    found = [(each["partition"], each["part"], each["path"]) for each in json.loads(ran.out)["files"]]
    assert (1, "data", "/other") in found
    assert (None, "none", None) in found
    said = tapfs("check", "--files", "--range", "0:512", image).out
    assert "outside all partitions" in said


def test_what_differs_from_a_sidecar_is_told_as_files(tapfs: Run, image: Path, tmp_path: Path) -> None:
    assert tapfs("hash", "--leaf", "4K", image).code == 0
    victim = _place_of(tmp_path / "disk.raw", (tmp_path / "files/folder/victim").read_bytes())
    with api.open(image, writable=True) as disk:
        disk.write(victim, b"spoiled")
    ran = tapfs("verify", "--json", "--files", image)
    assert ran.code == 1
    assert [each["path"] for each in json.loads(ran.out)["files"]] == ["/folder/victim"]
    assert "/folder/victim" in tapfs("verify", "--files", image).out


@pytest.mark.parametrize("options", [("--range", "0:512"), ("--files", "--range", "5"), ("--files", "--no-backing")])
def test_options_that_do_not_go_together(tapfs: Run, image: Path, options: tuple[str, ...]) -> None:
    assert tapfs("check", *options, image).code == 64
