"""`tapfs info`: what everybody is shown, what -v adds, and the whole chain."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]

ENGINEERS_WORDS = ("granule", "l1 ", "l2 ", "oversized", "fast path", "extended header", "era", "byte order")


def _rows(out: str) -> dict[str, str]:
    return {label.strip(): value.strip() for label, _, value in (line.partition(":") for line in out.splitlines())}


@pytest.fixture
def overlay(tapfs: Run, tmp_path: Path) -> Path:
    base, path = tmp_path / "base.raw", tmp_path / "over.qcow"
    assert tapfs("create", base, "1M") == (0, "", "")
    assert tapfs("create", "-f", "qcow", "-o", "blktap=on", "-b", base, "-F", "raw", path) == (0, "", "")
    return path


def test_how_a_format_stores_it_is_for_those_who_ask(tapfs: Run, overlay: Path) -> None:
    plain = _rows(tapfs("info", "--backing-format", "raw", overlay).out)
    assert plain["layout"] == "blktap"
    assert plain["cluster size"] == "512 bytes"
    assert not [label for label in plain if label.startswith(ENGINEERS_WORDS)]
    full = _rows(tapfs("info", "-v", "--backing-format", "raw", overlay).out)
    assert plain.items() <= full.items()
    for word in ENGINEERS_WORDS:
        assert any(label.startswith(word) or word in label for label in full), word


def test_a_raw_image(tapfs: Run, tmp_path: Path) -> None:
    image = tmp_path / "a.raw"
    image.write_bytes(b"\0")
    plain = _rows(tapfs("info", image).out)
    assert set(plain) == {"path", "format", "virtual size", "file size", "allocated size", "encrypted"}
    assert plain["virtual size"] == "1 byte"
    assert _rows(tapfs("info", "-v", image).out)["granule"] == "1 byte"


def test_the_whole_chain(tapfs: Run, overlay: Path) -> None:
    words = ("info", "--backing-format", "raw", "--backing-chain", overlay)
    first, second = tapfs(*words).out.split("\n\n")
    assert _rows(first)["path"] == str(overlay)
    assert _rows(second)["format"] == "raw"
    described = json.loads(tapfs(*words, "--json").out)
    assert [each["path"] for each in described] == [str(overlay), str(overlay.parent / "base.raw")]
    assert described[0] == json.loads(tapfs("info", "--backing-format", "raw", "--json", overlay).out)
    assert [len(each["chain"]) for each in described] == [2, 1]


def test_a_wrong_password_is_suspected(tapfs: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, image, empty = tmp_path / "disk.raw", tmp_path / "a.qcow", tmp_path / "empty.qcow"
    disk.touch()
    subprocess.run(["mkfs.ext2", "-q", "-F", disk, "1M"], check=True, capture_output=True)
    monkeypatch.setenv("TAPFS_PASSWORD", "right")
    assert tapfs("convert", "-f", "raw", "-O", "qcow", "--encrypt", disk, image) == (0, "", "")
    assert tapfs("create", "-f", "qcow", "--encrypt", empty, "1M") == (0, "", "")
    assert tapfs("info", image).err == tapfs("info", empty).err == ""
    monkeypatch.setenv("TAPFS_PASSWORD", "wrong")
    code, _, err = tapfs("info", image)
    assert (code, err.count("is the password right?")) == (0, 1)
    assert tapfs("info", empty).err == ""
    monkeypatch.delenv("TAPFS_PASSWORD")
    assert tapfs("info", image).err == ""


def test_a_packed_image_says_so(tapfs: Run, tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    assert tapfs("create", "-f", "qcow2", image, "1M").code == 0
    assert "packed:" not in tapfs("info", image).out
    assert json.loads(tapfs("info", "--json", image).out)["packed"] is None
    packed = tmp_path / "disk.qcow2.gz"
    packed.write_bytes(gzip.compress(image.read_bytes()))
    assert re.search(r"^packed: +gzip$", tapfs("info", packed).out, re.MULTILINE)
    assert json.loads(tapfs("info", "--json", packed).out)["packed"] == "gzip"


@pytest.mark.parametrize(("name", "is_noted"), [("lost.qcow2", True), ("disk-flat.VMDK", True), ("disk.raw", False)])
def test_a_name_that_promises_another_format_is_noted(tapfs: Run, tmp_path: Path, name: str, *, is_noted: bool) -> None:
    path = tmp_path / name
    path.write_bytes(b"garbage" * 1000)
    told = "nothing in the file shows that format"
    assert (told in tapfs("info", path).out) is is_noted
    assert told not in tapfs("info", "-f", "raw", path).out
