"""The life of an Image object: closed, dropped, shown, and opened with arguments of the wrong type."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import tapfs
from tapfs import ImageError
from tapfs.jobs.create import NewImage

SIZE = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow"
    tapfs.create(str(path), "qcow", SIZE)
    return path


def open_descriptors_of(path: Path) -> int:
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return sum(os.readlink(link) == str(path) for link in links if os.path.lexists(link))


def test_a_dropped_image_closes_its_files_and_warns(image: Path) -> None:
    for _ in range(20):
        with pytest.warns(ResourceWarning, match=r"unclosed disk image '.*disk\.qcow'$"):
            tapfs.open(image, writable=True)
    assert open_descriptors_of(image) == 0
    tapfs.open(image, writable=True).close()


def test_the_warning_says_what_a_missing_flush_loses(image: Path) -> None:
    with pytest.warns(ResourceWarning, match=r"[1-9]\d* bytes of its metadata were not flushed and are lost"):
        tapfs.open(image, writable=True).write(0, b"x")
    assert open_descriptors_of(image) == 0
    assert tapfs.check(image).corruptions == 0


def test_an_image_that_was_closed_or_abandoned_gives_no_warning(image: Path) -> None:
    for end in (tapfs.Image.close, tapfs.Image.abandon):
        disk = tapfs.open(image, writable=True)
        disk.write(0, b"x")
        end(disk)
        del disk


def test_an_image_that_is_open_at_the_end_of_the_program_is_named(image: Path) -> None:
    program = f"import tapfs; disk = tapfs.open({str(image)!r}, writable=True); disk.write(0, b'x')"
    command = [sys.executable, "-W", "default", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "ResourceWarning: unclosed disk image" in done.stderr
    assert "not flushed" in done.stderr


def test_a_forked_copy_of_an_image_ends_without_a_word(image: Path) -> None:
    program = f"""
import os, sys, tapfs
disk = tapfs.open({str(image)!r}, writable=True)
disk.write(0, b"x")
if os.fork() == 0:
    sys.exit()
os.wait()
disk.close()
"""
    command = [sys.executable, "-W", "default::ResourceWarning", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == ""
    with tapfs.open(image) as disk:
        assert disk.read(0, 1) == b"x"


@pytest.mark.parametrize(
    "ask",
    [
        lambda disk: disk.info,
        lambda disk: disk.contents(),
        lambda disk: disk.allocated_bytes,
        lambda disk: disk.statistics(),
        lambda disk: disk.whole_file(),
        lambda disk: disk.stream_writer(),
        lambda disk: list(disk.extents()),
        lambda disk: disk.read(0, 1),
        lambda disk: disk.write(0, b"x"),
        lambda disk: disk.flush(),
    ],
)
def test_a_closed_image_answers_nothing_from_its_files(image: Path, ask: Callable[[tapfs.Image], object]) -> None:
    disk = tapfs.open(image, writable=True)
    disk.close()
    with pytest.raises(ImageError, match="is closed"):
        ask(disk)


def test_a_closed_image_still_says_what_it_was(image: Path) -> None:
    disk = tapfs.open(image)
    disk.close()
    assert (disk.size, disk.path, disk.format_name, disk.parents) == (SIZE, str(image), "qcow", ())
    assert not disk.writable
    assert disk.unflushed_bytes == 0


def test_the_repr_names_file_format_size_and_state(image: Path) -> None:
    with tapfs.open(image, writable=True) as disk:
        assert repr(disk) == f"<tapfs.Image '{image}': qcow, {SIZE} bytes, writable>"
    assert repr(disk).endswith("closed>")
    with tapfs.open(image) as disk:
        assert repr(disk).endswith("read-only>")


def test_a_repr_has_no_password(image: Path) -> None:
    assert "secret" not in repr(NewImage("qcow", SIZE, password=b"secret"))
    with tapfs.open(image, password=b"secret") as disk:
        assert "secret" not in repr(disk)


def test_text_is_neither_a_password_nor_a_sequence_of_formats(image: Path) -> None:
    with pytest.raises(TypeError, match="bytes, not str"):
        tapfs.open(image, password="secret")  # type: ignore[arg-type]  # noqa: S106
    with pytest.raises(TypeError, match="bytes, not str"):
        NewImage("qcow", SIZE, password="secret")  # type: ignore[arg-type]  # noqa: S106
    with pytest.raises(TypeError, match="not one str"):
        tapfs.open(image, backing_formats="qcow")
    assert open_descriptors_of(image) == 0


def test_dir_shows_what_programs_are_promised(image: Path) -> None:
    with tapfs.open(image) as disk:
        shown = {name for name in dir(disk) if not name.startswith("_")}
    properties = {"size", "path", "format_name", "granule", "writable", "temporary", "closed", "parents", "info"}
    properties |= {"needs_password", "sector_size"}
    reading = {"read", "read_into", "extents", "contents", "open", "open_snapshot", "allocated_bytes"}
    writing = {"write", "write_zeroes", "discard", "flush", "unflushed_bytes", "close", "abandon"}
    assert shown == properties | reading | writing
