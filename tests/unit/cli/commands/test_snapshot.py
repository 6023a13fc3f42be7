"""`tapfs snapshot`, and the snapshots that `info` shows."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import tapfs as api
from tapfs.cli.commands.snapshot import clock_text
from tests.conftest import Ran

Run = Callable[..., Ran]


@pytest.fixture
def image(tapfs: Run, tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    assert tapfs("create", "-q", "-f", "qcow2", path, "8M").code == 0
    return path


def filled(image: Path, byte: int) -> None:
    with api.open(image, writable=True) as disk:
        disk.write(1000, bytes([byte]) * 100_000)


def first(image: Path, snapshot: str | None = None) -> int:
    with api.open(image, snapshot=snapshot) as disk:
        return disk.read(1000, 1)[0]


def test_a_snapshot_is_made_read_applied_and_deleted(tapfs: Run, image: Path) -> None:
    filled(image, 1)
    assert tapfs("snapshot", "-c", "one", image) == (0, "", "")
    filled(image, 2)
    assert (first(image), first(image, "one")) == (2, 1)
    assert tapfs("snapshot", "--apply", "one", image) == (0, "", "")
    assert first(image) == 1
    filled(image, 3)
    assert first(image, "1") == 1
    assert tapfs("snapshot", "-q", "-d", "1", image) == (0, "", "")
    assert tapfs("snapshot", image).out == f"{image}: no snapshots\n"
    assert tapfs("check", "-q", image).code == 0


def test_the_list_has_a_row_for_each(tapfs: Run, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    for name in ("one", "two words\n"):
        assert tapfs("snapshot", "-c", name, image).code == 0
    lines = tapfs("snapshot", "-l", image).out.splitlines()
    assert lines[0].split() == ["ID", "NAME", "CREATED", "DISK", "VM", "STATE", "VM", "CLOCK"]
    assert lines[1].startswith("1   one")
    assert "two words\\n" in lines[2]
    assert lines[1].endswith("8 MiB  -         -")
    assert tapfs("snapshot", "-U", image).out.splitlines() == lines


def test_json_has_what_there_is_after_a_change(tapfs: Run, image: Path) -> None:
    before = int(time.time())
    document = json.loads(tapfs("snapshot", "-c", "one", "--json", image).out)
    (found,) = document["snapshots"]
    assert document["path"] == os.fspath(image)
    assert (found["id"], found["name"], found["virtual_size"]) == ("1", "one", 8 << 20)
    assert before <= found["seconds"] <= time.time()
    assert json.loads(tapfs("snapshot", "-d", "one", "--output=json", image).out)["snapshots"] == []


def test_info_shows_them_in_words(tapfs: Run, image: Path) -> None:
    tapfs("snapshot", "-c", "one", image)
    assert "snapshots:      one: id 1, made " in tapfs("info", image).out
    assert "virtual size 8 MiB" in tapfs("info", image).out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("-c", "one"), 18, "has a snapshot 'one'; choose another name, or delete that one"),
        (("-a", "two"), 17, "has no snapshot 'two'; there are: one"),
        (("-d", ""), 17, "has no snapshot ''"),
        (("-l", "-c", "x"), 64, "not allowed with argument"),
    ],
)
def test_what_cannot_be_done(tapfs: Run, image: Path, words: tuple[str, ...], code: int, message: str) -> None:
    tapfs("snapshot", "-c", "one", image)
    before = image.read_bytes()
    ran = tapfs("snapshot", *words, image)
    assert (ran.code, ran.out) == (code, "")
    assert message in ran.err
    assert image.read_bytes() == before


def test_another_user_of_the_image_is_in_the_way(tapfs: Run, image: Path) -> None:
    with api.open(image, writable=True):
        ran = tapfs("snapshot", "-c", "one", image)
        assert ran.code == 15
        assert tapfs("snapshot", "-U", image).code == 0


def test_formats_without_snapshots_say_so(tapfs: Run, tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(bytes(4096))
    for words in (("-l",), ("-c", "one", "-f", "raw")):
        ran = tapfs("snapshot", *words, tmp_path / "raw")
        assert ran.code == 12
        assert "raw images keep no snapshots" in ran.err


def test_python(image: Path) -> None:
    api.create_snapshot(image, "one")
    assert [each.name for each in api.snapshots(image, format="qcow2")] == ["one"]
    api.apply_snapshot(image, "one")
    api.delete_snapshot(image, "one")
    assert api.snapshots(image) == []


def test_clock() -> None:
    assert clock_text(3_661_250_000_000) == "01:01:01.250"
