"""An image that goes into a pipe is the image that a file would have got, byte after byte, and nothing is sought."""

from __future__ import annotations

import io
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tapfs as api
from tapfs import ErrorKind, ImageError
from tapfs.jobs.create import NewImage
from tapfs.jobs.streamed_image import write_image

MIB = 1 << 20
SIZE = 3 * MIB + 3 * 512
DRAWN = random.Random(13)
KINDS: dict[str, tuple[str, dict[str, str]]] = {
    "raw": ("raw", {}),
    "qcow": ("qcow", {}),
    "qcow2": ("qcow2", {}),
    "qcow2-512": ("qcow2", {"cluster_size": "512", "refcount_bits": "64"}),
    "qcow2-subclusters": ("qcow2", {"extended_l2": "on"}),
    "qcow2-metadata": ("qcow2", {"preallocation": "metadata"}),
    "vdi": ("vdi", {}),
    "vhd": ("vhd", {}),
    "vhd-fixed": ("vhd", {"subformat": "fixed"}),
    "vhdx": ("vhdx", {}),
    "vmdk": ("vmdk", {}),
    "vmdk-stream": ("vmdk", {"subformat": "streamOptimized"}),
}


class Pipe(io.RawIOBase):
    """Takes bytes in order and can do nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.taken = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.taken += data
        return len(data)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, zeros inside the data, data in no order of places, and a last cluster that is not whole."""
    content = bytearray(SIZE)
    for at, length in ((0, 512), (70_000, 5000), (MIB, 300_000), (3 * MIB + 512, 512)):
        content[at : at + length] = DRAWN.randbytes(length)
    content[MIB + 65_536 : MIB + 131_072] = bytes(65_536)
    path = tmp_path_factory.mktemp("disk") / "disk.raw"
    path.write_bytes(content)
    return path


def piped(source: Path, new: NewImage, **options: Any) -> bytes:
    pipe = Pipe()
    with api.open(source, format="raw") as image:
        write_image(image, new, pipe, name="disk.img", **options)
    return bytes(pipe.taken)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipe_gets_the_image_that_a_file_would_have_got(kind: str, disk: Path, tmp_path: Path) -> None:
    format_name, options = KINDS[kind]
    told: list[str] = []
    content = piped(disk, NewImage(format_name, SIZE, options=options), on_scratch=told.append)
    target = tmp_path / "disk.img"
    target.write_bytes(content)
    api.convert(disk, tmp_path / "file.img", format="raw", target_format=format_name, options=options)
    assert len(content) == (tmp_path / "file.img").stat().st_size
    with api.open(target, format=format_name) as image:
        assert image.read(0, SIZE) == disk.read_bytes()
    if format_name != "raw":
        assert api.check(target, format=format_name).corruptions == 0
    assert told == []


def test_a_pipe_gets_a_stream_of_many_tables(tmp_path: Path) -> None:
    """Each table of 32 MiB lies between the grains before it and those behind it."""
    source = tmp_path / "disk.raw"
    with source.open("wb") as file:
        for number in range(4):
            file.seek(number * 32 * MIB + 12_345)
            file.write(DRAWN.randbytes(100_000))
    size = source.stat().st_size
    content = piped(source, NewImage("vmdk", size, options={"subformat": "streamOptimized"}))
    target = tmp_path / "disk.vmdk"
    target.write_bytes(content)
    with api.open(target) as image:
        assert image.read(0, size) == source.read_bytes()


@pytest.mark.parametrize("password", [None, b"secret"])
def test_what_has_no_order_is_made_in_a_scratch_file(password: bytes | None, disk: Path, tmp_path: Path) -> None:
    told: list[str] = []
    new = NewImage("qcow2", SIZE, password=password, compressed=password is None)
    target = tmp_path / "disk.qcow2"
    target.write_bytes(piped(disk, new, on_scratch=told.append))
    with api.open(target, password=password) as image:
        assert image.read(0, SIZE) == disk.read_bytes()
    assert len(told) == 1


def test_an_overlay_has_what_differs_from_its_parent(disk: Path, tmp_path: Path) -> None:
    changed = bytearray(disk.read_bytes())
    changed[MIB : MIB + 4] = b"new!"
    (tmp_path / "new.raw").write_bytes(changed)
    new = NewImage("qcow2", SIZE, backing=str(disk), backing_format="raw")
    target = tmp_path / "overlay.qcow2"
    target.write_bytes(piped(tmp_path / "new.raw", new))
    with api.open(target) as image:
        assert image.read(0, SIZE) == changed
        assert sum(extent.length for extent in image.extents() if extent.depth == 0 and extent.data) == 65_536


def test_an_image_of_several_files_is_refused(disk: Path) -> None:
    with pytest.raises(ImageError, match="several files") as raised:
        piped(disk, NewImage("vmdk", SIZE, options={"subformat": "twoGbMaxExtentSparse"}))
    assert raised.value.kind is ErrorKind.UNSUPPORTED


def test_images_go_from_program_to_program(disk: Path, tapfs_command: list[str], tmp_path: Path) -> None:
    convert = [*tapfs_command, "convert", "-q"]
    with (
        subprocess.Popen([*convert, "-f", "raw", "-O", "vmdk", disk, "-"], stdout=subprocess.PIPE) as first,
        subprocess.Popen([*convert, "-", "-"], stdin=first.stdout, stdout=subprocess.PIPE) as second,
    ):
        assert second.stdout is not None
        assert second.stdout.read() == disk.read_bytes()
    assert (first.returncode, second.returncode) == (0, 0)


def test_standard_input_that_is_a_file_is_read_as_it_is(disk: Path, tapfs_command: list[str], tmp_path: Path) -> None:
    with disk.open("rb") as file:
        words = [*tapfs_command, "convert", "-f", "raw", "-", tmp_path / "copy"]
        done = subprocess.run(words, stdin=file, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "copy").read_bytes() == disk.read_bytes()


def test_a_pipe_that_nothing_came_from_is_no_disk(tapfs_command: list[str], tmp_path: Path) -> None:
    target = tmp_path / "copy"
    target.write_bytes(b"kept")
    words = [*tapfs_command, "convert", "-f", "raw", "-", target]
    done = subprocess.run(words, input=b"", capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (11, b"")
    assert b"ended before its first byte" in done.stderr
    assert target.read_bytes() == b"kept"


def test_a_copy_of_standard_input_has_a_limit(disk: Path, tapfs_command: list[str], tmp_path: Path) -> None:
    words = [
        *tapfs_command,
        "convert",
        "--spool-limit",
        "64K",
        "-f",
        "raw",
        "-O",
        "qcow2",
        "-c",
        "-",
        tmp_path / "copy",
    ]
    done = subprocess.run(words, input=disk.read_bytes(), capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (14, b"")
    assert b"say a larger --spool-limit" in done.stderr
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-n", "d.raw", "-"], "not to standard output"),
        (["--spool-limit", "1M", "d.raw", "e.raw"], "--spool-limit goes with -"),
        (["-", "-", "e.raw"], "one SOURCE at most"),
    ],
)
def test_what_a_pipe_cannot_be_is_a_usage_error(tapfs: Callable[..., Any], words: list[str], message: str) -> None:
    code, _, err = tapfs("convert", *words)
    assert code == 64
    assert message in err
