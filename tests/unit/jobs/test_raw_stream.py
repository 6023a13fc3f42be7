"""A raw disk that comes through a pipe becomes an image as it comes: every format, no scratch file, all or nothing."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import tapfs as api
from tapfs import ErrorKind, ImageError
from tapfs.jobs import growing_image, raw_stream
from tapfs.jobs.copying import CopyOptions
from tapfs.jobs.create import NewImage
from tests.fuse.conftest import wait_for

MIB = 1 << 20
KINDS: dict[str, tuple[str, dict[str, str], str]] = {
    "raw": ("raw", {}, "raw"),
    "qcow": ("qcow", {}, "qcow"),
    "qcow2": ("qcow2", {}, "qcow2"),
    "qcow2-512": ("qcow2", {"cluster_size": "512"}, "qcow2"),
    "vdi": ("vdi", {}, "vdi"),
    "vhd": ("vhd", {}, "vpc"),
    "vhdx": ("vhdx", {}, "vhdx"),
    "vmdk": ("vmdk", {}, "vmdk"),
}


@pytest.fixture(scope="module")
def content() -> bytes:
    """Longer than what an image has room for at first, with zeros, and of no whole number of sectors."""
    noise = random.Random(2)
    return b"".join((noise.randbytes(3 * MIB), bytes(3 * MIB), noise.randbytes(5 * MIB + 4096), bytes(777), b"end"))


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing_image, "FIRST_BYTES", MIB)
    monkeypatch.setattr(raw_stream, "_WINDOW_BYTES", 3 << 18)


def pipe_of(content: bytes) -> Callable[[memoryview], int]:
    """What fills memory with the content, and with less than there is room for at its end only."""
    at = 0

    def fill(piece: memoryview) -> int:
        nonlocal at
        part = content[at : at + len(piece)]
        piece[: len(part)] = part
        at += len(part)
        return len(part)

    return fill


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_grows_as_the_disk_comes(kind: str, content: bytes, tmp_path: Path) -> None:
    format_name, options, of_qemu = KINDS[kind]
    new = NewImage(format_name, None, options=options)
    path = tmp_path / "disk.img"
    assert raw_stream.can_be_streamed(str(path), new)
    raw_stream.image_of_stream(pipe_of(content), str(path), new)
    with api.open(path, format=format_name) as image:
        assert image.size - len(content) in range(512)
        assert image.read(0, len(content)) == content
        assert image.read(len(content), image.size - len(content)).count(0) == image.size - len(content)
    if format_name != "raw":
        assert api.check(path, format=format_name).corruptions == 0
    (tmp_path / "raw").write_bytes(content)
    words = ["qemu-img", "compare", "-f", of_qemu, "-F", "raw", path, tmp_path / "raw"]
    subprocess.run(words, check=True, capture_output=True)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["disk.img", "raw"]


@pytest.mark.parametrize("length", [1, 511, MIB, MIB + 1])
def test_a_disk_of_any_length_has_that_length(length: int, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    for format_name in ("raw", "qcow2"):
        raw_stream.image_of_stream(pipe_of(b"x" * length), str(path), NewImage(format_name, None))
        with api.open(path, format=format_name) as image:
            assert image.size == (length if format_name == "raw" else -(-length // 512) * 512)
            assert image.read(0, length) == b"x" * length


@pytest.mark.parametrize("format_name", ["raw", "vdi"])
def test_a_pipe_that_fails_or_is_empty_changes_nothing(format_name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"old")
    new = NewImage(format_name, None)
    healthy = pipe_of(content)

    def failing(piece: memoryview) -> int:
        count = healthy(piece)
        if not count:
            raise ImageError(ErrorKind.IO, "the pipe broke", op="read")
        return count

    for fill, said in ((failing, "the pipe broke"), (pipe_of(b""), "ended before its first byte")):
        with pytest.raises(ImageError, match=said):
            raw_stream.image_of_stream(fill, str(path), new)
        assert path.read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["disk"]


def test_zeros_are_holes_or_data_as_is_wanted(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    zeros = bytes(2 * MIB)
    raw_stream.image_of_stream(pipe_of(zeros), str(path), NewImage("raw", None))
    assert path.stat().st_blocks == 0
    raw_stream.image_of_stream(pipe_of(zeros), str(path), NewImage("raw", None), CopyOptions(sparse_bytes=0))
    assert path.stat().st_blocks * 512 >= 2 * MIB


def test_what_cannot_grow_is_left_to_the_scratch_file(tmp_path: Path) -> None:
    path = str(tmp_path / "disk")
    for new in (
        NewImage("qcow2", None, compressed=True),
        NewImage("qcow2", None, options={"preallocation": "full"}),
        NewImage("vmdk", None, options={"subformat": "streamOptimized"}),
    ):
        assert not raw_stream.can_be_streamed(path, new)
    assert not raw_stream.can_be_streamed("ram:x", NewImage("ram", None))


@pytest.mark.parametrize("subformat", ["twoGbMaxExtentSparse", "twoGbMaxExtentFlat"])
def test_a_disk_whose_files_have_a_bound_does_not_grow(subformat: str, tmp_path: Path) -> None:
    """A larger disk has more files, and no image gets another one later."""
    path = str(tmp_path / "disk.vmdk")
    assert not raw_stream.can_be_streamed(path, NewImage("vmdk", None, options={"subformat": subformat}))
    assert raw_stream.can_be_streamed(path, NewImage("vmdk", None, options={"subformat": "monolithicFlat"}))


def test_the_command_keeps_nothing_of_a_raw_pipe(tapfs_command: list[str], content: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out.qcow2"
    words = [*tapfs_command, "convert", "-f", "raw", "-", "-O", "qcow2", str(out)]
    nowhere = os.environ | {"TMPDIR": str(tmp_path / "missing")}
    ran = subprocess.run(words, input=content, capture_output=True, check=False, env=nowhere)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, b"", b"")
    with api.open(out) as image:
        assert image.read(0, len(content)) == content
    words = [*tapfs_command, "convert", "-f", "raw", "-", "-O", "raw", "-"]
    ran = subprocess.run(words, input=content, capture_output=True, check=False, env=nowhere)
    assert (ran.returncode, ran.stdout == content, ran.stderr) == (0, True, b"")


@pytest.mark.parametrize("words", [("--disk", "1"), ("--snapshot", "one"), ("--backing", "other.raw")])
def test_a_disk_inside_of_the_pipe_is_not_the_pipe(
    words: tuple[str, str], tapfs_command: list[str], tmp_path: Path
) -> None:
    command = [*tapfs_command, "convert", "-f", "raw", *words, "-", "new.raw"]
    done = subprocess.run(command, input=b"d" * MIB, cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode != 0
    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_nothing_and_what_was_there(tapfs_command: list[str], content: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out.qcow2"
    out.write_bytes(b"")
    words = [*tapfs_command, "convert", "-f", "raw", "-", "-O", "qcow2", str(out)]
    with subprocess.Popen(words, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(content)
        process.stdin.flush()
        wait_for(lambda: _written(process.pid) > MIB)
        process.kill()
    assert os.listdir(tmp_path) == ["out.qcow2"]
    assert out.read_bytes() == b""


def _written(process: int) -> int:
    lines = Path(f"/proc/{process}/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar"))
