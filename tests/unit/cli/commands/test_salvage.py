"""`tapfs salvage`: what it says, writes and refuses; what is found is tested with the formats."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tapfs as api
from tapfs.errors import CODES, ErrorKind

Run = Callable[..., Any]
MIB = 1 << 20
CONTENT = bytes(range(256)) * 1024


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A qcow2 image whose first sector is zeros."""
    path = tmp_path / "disk.qcow2"
    api.create(path, "qcow2", 8 * MIB)
    with api.open(path, writable=True) as image:
        image.write(8 * MIB - len(CONTENT), CONTENT)
    with path.open("r+b") as file:
        file.write(bytes(512))
    return path


def test_the_disk_is_copied_and_told(tapfs: Run, damaged: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.raw"
    ran = tapfs("salvage", "-f", "qcow2", damaged, target)
    assert ran.code == 1  # whether there was a parent, nobody knows
    assert "rebuilt: the header" in ran.out
    assert "nothing says whether the disk had a parent" in ran.err
    assert target.read_bytes() == bytes(8 * MIB - len(CONTENT)) + CONTENT


def test_a_dry_run_writes_nothing(tapfs: Run, damaged: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    ran = tapfs("salvage", "-f", "qcow2", "--dry-run", "--json", "--size", "8M", damaged)
    document = json.loads(ran.out)
    assert (document["size"], document["lost"], document["unplaced_written"]) == (8 * MIB, None, None)
    assert sorted(tmp_path.iterdir()) == before


def test_a_sound_image_is_copied_with_exit_code_0(tapfs: Run, tmp_path: Path) -> None:
    path, target = tmp_path / "disk.qcow2", tmp_path / "out.qcow2"
    api.create(path, "qcow2", MIB)
    ran = tapfs("salvage", "-O", "qcow2", path, target)
    assert (ran.code, ran.out, ran.err) == (0, "nothing had to be rebuilt\n", "")
    assert tapfs("compare", path, target).code == 0


def test_what_no_table_names_is_written(tapfs: Run, tmp_path: Path) -> None:
    path, rest = tmp_path / "disk.qcow2", tmp_path / "rest"
    api.create(path, "qcow2", MIB)
    with path.open("r+b") as file:
        file.seek(MIB)
        file.write(CONTENT[:65536])
    ran = tapfs("salvage", path, tmp_path / "out.raw", "--unplaced", rest, "--json")
    assert json.loads(ran.out)["unplaced_written"] == 65536
    assert rest.read_bytes() == CONTENT[:65536]
    ran = tapfs("salvage", path, tmp_path / "out2.raw", "--unplaced", rest)
    assert ran.code == CODES[ErrorKind.EXISTS].exit_code  # it is never replaced


def test_a_lost_range_becomes_zeros_and_is_named(tapfs: Run, tmp_path: Path) -> None:
    path, target = tmp_path / "disk.qcow2", tmp_path / "out.raw"
    api.create(path, "qcow2", 4 * MIB, options={"cluster_size": "4096"})
    with api.open(path, writable=True) as image:
        image.write(0, b"a" * 4 * MIB)
    head = path.read_bytes()[:48]
    with path.open("r+b") as file:
        file.seek(int.from_bytes(head[40:48], "big") + 8)
        file.write(b"\x01" * 8)
    ran = tapfs("salvage", path, target)
    assert ran.code == 1
    assert f"bytes {2 * MIB} to {4 * MIB} of the disk became zeros" in ran.err
    assert target.read_bytes() == b"a" * 2 * MIB + bytes(2 * MIB)


@pytest.mark.parametrize("words", [(), ("--dry-run", "x.raw"), ("--dry-run", "--unplaced", "x")])
def test_a_target_or_a_dry_run(tapfs: Run, damaged: Path, words: tuple[str, ...]) -> None:
    assert tapfs("salvage", damaged, *words).code == 64


def test_a_format_without_tables_is_refused_with_what_to_say(tapfs: Run, damaged: Path, tmp_path: Path) -> None:
    ran = tapfs("salvage", damaged, tmp_path / "out.raw")
    assert ran.code != 0
    assert "-f FMT" in ran.err


def test_nothing_is_guessed_where_data_does_not_say_where_it_belongs(tapfs: Run, tmp_path: Path) -> None:
    api.create(tmp_path / "disk", "qcow", 8 * MIB)
    ran = tapfs("salvage", "-f", "qcow", tmp_path / "disk", tmp_path / "out.raw")
    assert ran.code == CODES[ErrorKind.UNSUPPORTED].exit_code
    assert "could only be guessed" in ran.err
    assert not (tmp_path / "out.raw").exists()
