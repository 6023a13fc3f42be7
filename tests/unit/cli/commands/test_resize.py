"""`tapfs resize` of images: raw ones and RAM disks, by a size or a difference."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tapfs as tapfs_package
from tapfs.errors import CODES, EXIT_USAGE, ErrorKind

Run = Callable[..., Any]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.raw"
    path.write_bytes(b"data" * 1024)
    return path


@pytest.mark.parametrize(("size", "result"), [("1M", 1 << 20), ("+4K", 8192), ("8192", 8192), ("+0", 4096)])
def test_larger(tapfs: Run, image: Path, size: str, result: int) -> None:
    ran = tapfs("resize", "-f", "raw", image, size)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith(f"{result} bytes (")
    assert image.read_bytes() == b"data" * 1024 + bytes(result - 4096)


@pytest.mark.parametrize("size", ["1K", "-3K"])
def test_smaller_only_if_that_is_said(tapfs: Run, image: Path, size: str) -> None:
    code, out, err = tapfs("resize", "-f", "raw", image, size)
    assert (code, out) == (CODES[ErrorKind.OUT_OF_BOUNDS].exit_code, "")
    assert "--shrink" in err
    assert image.stat().st_size == 4096
    assert tapfs("resize", "-q", "-f", "RAW", "--shrink", image, size) == (0, "", "")
    assert image.read_bytes() == b"data" * 256


@pytest.mark.parametrize("size", ["-5K", "9E"])
def test_sizes_that_cannot_be(tapfs: Run, image: Path, size: str) -> None:
    ran = tapfs("resize", "-f", "raw", "--shrink", image, size)
    assert ran.code in (CODES[ErrorKind.OUT_OF_BOUNDS].exit_code, EXIT_USAGE)
    assert len(ran.err.splitlines()) == 1
    assert image.stat().st_size == 4096
    assert tapfs("resize", "-f", "raw", image, "+7E").code in (
        CODES[ErrorKind.OUT_OF_BOUNDS].exit_code,
        CODES[ErrorKind.NO_SPACE].exit_code,
        CODES[ErrorKind.IO].exit_code,
    )


def test_a_ram_disk(tapfs: Run, ram_name: str) -> None:
    assert tapfs("create", ram_name, "1M") == (0, "", "")
    assert tapfs("resize", ram_name, "2M").out == "2097152 bytes (2 MiB)\n"
    assert json.loads(tapfs("info", "--json", ram_name).out)["virtual_size"] == 2 << 20


def test_a_raw_image_must_be_named(tapfs: Run, image: Path) -> None:
    code, _, err = tapfs("resize", image, "1M")
    assert code == CODES[ErrorKind.READ_ONLY].exit_code
    assert "-f raw" in err
    assert image.stat().st_size == 4096


def test_other_formats_say_what_to_do(tapfs: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("tapfs.formats.qcow2.editable.EditableQcow2Driver.resize")
    image, overlay = tmp_path / "a.qcow2", tmp_path / "larger.qcow2"
    assert tapfs("create", "-f", "qcow2", image, "1M") == (0, "", "")
    before = image.read_bytes()
    code, _, err = tapfs("resize", image, "2M")
    assert code == CODES[ErrorKind.UNSUPPORTED].exit_code
    words = err.split("tapfs create ")[1].split()
    assert image.read_bytes() == before
    assert tapfs("create", *(str(overlay) if word == "NEW" else word for word in words)) == (0, "", "")
    assert json.loads(tapfs("info", "--json", overlay).out)["virtual_size"] == 2 << 20
    overlay.unlink()
    code, _, err = tapfs("resize", "--shrink", image, "1K")
    assert code == CODES[ErrorKind.UNSUPPORTED].exit_code
    words = err.split("tapfs convert ")[1].split()
    plain = tmp_path / "plain.qcow2"
    assert tapfs("convert", *(str(plain) if word == "NEW" else word for word in words)).code == 0


def test_what_an_overlay_gains_is_not_its_parents(tapfs: Run, tmp_path: Path) -> None:
    parent, overlay = tmp_path / "parent.raw", tmp_path / "overlay.qcow2"
    parent.write_bytes(b"old!" * (1 << 18))
    assert tapfs("create", "-f", "qcow2", "-b", "parent.raw", "-F", "raw", overlay, "100000").code == 0
    assert tapfs("resize", overlay, "2M").out == "2097152 bytes (2 MiB)\n"
    with tapfs_package.open(overlay) as disk:
        start = 100_352  # 100000 rounded up to a sector, as for a new image
        assert disk.read(0, start) == b"old!" * (start // 4)
        assert disk.read(start, disk.size - start) == bytes(disk.size - start)


def test_an_overlay_without_its_parent_does_not_grow(tapfs: Run, tmp_path: Path) -> None:
    parent, overlay = tmp_path / "parent.raw", tmp_path / "overlay.qcow2"
    parent.write_bytes(b"old!" * (1 << 18))
    assert tapfs("create", "-f", "qcow2", "-b", "parent.raw", "-F", "raw", overlay).code == 0
    moved = parent.rename(tmp_path / "moved.raw")
    code, _, err = tapfs("resize", overlay, "2M")
    assert code == CODES[ErrorKind.NOT_FOUND].exit_code
    assert "--backing" in err
    assert tapfs("resize", "--backing", moved, overlay, "2M").code == 0


def test_what_was_cut_off_does_not_come_back(tapfs: Run, tmp_path: Path) -> None:
    image = tmp_path / "a.qcow2"
    assert tapfs("create", "-f", "qcow2", image, "1M").code == 0
    with tapfs_package.open(image, writable=True) as disk:
        disk.write(0, b"data" * (1 << 18))
    assert tapfs("resize", "--shrink", image, "512").code == 0
    assert tapfs("check", image).code == 0
    assert tapfs("resize", image, "1M").code == 0
    with tapfs_package.open(image) as disk:
        assert disk.read(0, 1 << 20) == (b"data" * 128).ljust(1 << 20, b"\0")


def test_an_image_in_use(tapfs: Run, image: Path) -> None:
    with tapfs_open(image):
        assert tapfs("resize", "-f", "raw", image, "1M").code == CODES[ErrorKind.LOCKED].exit_code
    assert image.stat().st_size == 4096


def tapfs_open(image: Path) -> tapfs_package.Image:
    return tapfs_package.open(image, format="raw", writable=True)


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("a",),
        ("a", "b", "c"),
        ("a", "12Q"),
        ("a", "+-5"),
        ("--domain", "3", "5G"),
        ("--domain", "3", "--vdev", "xvda", "a", "5G"),
        ("--domain", "3", "--vdev", "xvda", "-f", "raw", "5G"),
        ("--domain", "3", "--vdev", "xvda", "+5G"),
    ],
    ids=" ".join,
)
def test_wrong_words(tapfs: Run, words: tuple[str, ...]) -> None:
    assert tapfs("resize", *words).code == EXIT_USAGE


@pytest.mark.parametrize(
    ("format_name", "mode"), [("raw", "falloc"), ("raw", "full"), ("qcow2", "full"), ("vdi", "full")]
)
def test_what_is_added_may_get_its_space_at_once(format_name: str, mode: str, tapfs: Run, tmp_path: Path) -> None:
    image = tmp_path / "disk"
    assert tapfs("create", "-f", format_name, image, "1M").code == 0
    before = image.stat().st_blocks * 512
    assert tapfs("resize", "-f", format_name, "--preallocation", mode, image, "3M").code == 0
    assert image.stat().st_blocks * 512 - before >= 2 << 20
    assert tapfs("check", "-f", format_name, image).code in (0, 63)


def test_space_that_cannot_be_had_at_once_is_refused_before_anything_changes(tapfs: Run, tmp_path: Path) -> None:
    image = tmp_path / "disk"
    assert tapfs("create", "-f", "qcow", image, "1M").code == 0
    content = image.read_bytes()
    assert "can have off or full" in tapfs("resize", "--preallocation=falloc", image, "3M").err
    assert "larger size only" in tapfs("resize", "--preallocation=full", "--shrink", image, "512K").err
    assert image.read_bytes() == content
