"""Images in file objects, and the fsspec file system of an image: the bytes are those of the file by its name."""

from __future__ import annotations

import gc
import io
import subprocess
import warnings
import zipfile
from pathlib import Path

import fsspec
import pytest

import tapfs
from tapfs import ErrorKind, Gate, ImageError
from tapfs.api.fsspec_files import TapfsFileSystem

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(b"".join(number.to_bytes(4, "big") for number in range(3 * MIB // 4)))
    tapfs.convert(raw, tmp_path / "disk.qcow2", format="raw", target_format="qcow2", compressed=True)
    return tmp_path / "disk.qcow2"


class Positioned:
    """Reads anywhere, a little at a time, and has no position."""

    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes()
        self.size = len(self.data)
        self.most = 0

    def pread(self, size: int, offset: int, /) -> bytes:
        self.most = max(self.most, size)
        return self.data[offset : offset + min(size, 10_000)]


def test_every_kind_of_object_reads_as_the_file(image: Path, tmp_path: Path) -> None:
    packed = tmp_path / "images.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(image, "disk.qcow2")
    wanted = (tmp_path / "disk.raw").read_bytes()
    with zipfile.ZipFile(packed) as archive, archive.open("disk.qcow2") as member, image.open("rb") as plain:
        for source in (plain, member, io.BytesIO(image.read_bytes()), Positioned(image), fsspec.open(str(image), "rb")):
            with tapfs.open(source) as disk:
                assert (disk.format_name, disk.size) == ("qcow2", 3 * MIB)
                assert disk.read(MIB + 5, 70_000) == wanted[MIB + 5 : MIB + 70_005]
                assert disk.read(0, 3 * MIB) == wanted
        with tapfs.open_file(member, partition=None) as file:
            assert file.read(8) == wanted[:8]
        assert plain.read(0) == b""  # it stays the caller's


def test_only_what_is_read_is_asked_for(image: Path) -> None:
    class Counting(io.BytesIO):
        total = 0

        def read(self, size: int | None = -1, /) -> bytes:
            data = super().read(size)
            self.total += len(data)
            return data

    source = Counting(image.read_bytes())
    size = len(source.getvalue())
    with tapfs.open(source) as disk:
        disk.read(0, 512)
        assert 0 < source.total < size // 2


def test_an_image_in_an_object_names_no_file_unless_allowed(image: Path, tmp_path: Path) -> None:
    tapfs.create(tmp_path / "over.qcow2", "qcow2", 3 * MIB, backing=str(image), backing_format="qcow2")
    data = (tmp_path / "over.qcow2").read_bytes()
    with pytest.raises(ImageError) as raised:
        tapfs.open(io.BytesIO(data))
    assert raised.value.kind is ErrorKind.DENIED
    for allowed in ({"backing": str(image)}, {"gate": Gate()}, {"backing_root": str(tmp_path)}):
        with tapfs.open(io.BytesIO(data), **allowed) as disk:  # type: ignore[arg-type]
            assert disk.read(4, 4) == b"\0\0\0\1"


def test_what_cannot_be_read_is_an_error(image: Path, tmp_path: Path) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() >= 128 << 10:
                raise RuntimeError("the line is cut")
            return super().read(size)

    with tapfs.open(Broken(bytes(MIB)), format="raw") as disk:
        assert disk.read(0, 10) == bytes(10)
        with pytest.raises(ImageError, match="the line is cut") as raised:
            disk.read(MIB // 2, 10)
        assert raised.value.kind is ErrorKind.IO
    shrinking = io.BytesIO(bytes(MIB))
    with tapfs.open(shrinking, format="raw") as disk:
        shrinking.truncate(1000)
        with pytest.raises(ImageError, match="ends at byte"):
            disk.read(MIB // 2, 10)
    with (tmp_path / "disk.raw").open(encoding="latin-1") as text, pytest.raises(ImageError, match="as binary"):
        tapfs.open(text)  # type: ignore[arg-type]
    for wrong in (7, object()):
        with pytest.raises(TypeError, match="neither read and seek nor pread"):
            tapfs.open(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="only read"):
        tapfs.open(io.BytesIO(bytes(MIB)), format="raw", writable=True)


def test_the_file_system_has_the_files_of_a_mount(image: Path, tmp_path: Path) -> None:
    disk = tmp_path / "parted.raw"
    disk.write_bytes(bytes(4 * MIB))
    subprocess.run(["sfdisk", "-q", disk], input=b"2048,2048\n4096,\n", check=True)
    parted = tmp_path / "parted.qcow2"
    tapfs.convert(disk, parted, format="raw", target_format="qcow2")
    with tapfs.open(parted, writable=True) as opened:
        opened.write(MIB, b"first")
    tapfs.create_snapshot(parted, "one")
    with tapfs.open(parted, writable=True) as opened:
        opened.write(MIB, b"later")
    with TapfsFileSystem(str(parted)) as files:
        assert sorted(files.ls("", detail=False)) == ["disk", "info.json", "part1", "part2", "snapshots"]
        assert files.ls("snapshots") == [{"name": "snapshots/one", "size": 4 * MIB, "type": "file"}]
        assert files.info("part1")["size"] == MIB
        assert files.cat_file("part1", 0, 5) == b"later"
        assert files.cat_file("snapshots/one", MIB, MIB + 5) == b"first"
        assert b'"format": "qcow2"' in files.cat("info.json")
        assert len(files.find("")) == 5
        with files.open("disk") as file:
            file.seek(MIB)
            assert file.read(5) == b"later"
        for wrong in ("part3", "snapshots/two", "disk/x"):
            with pytest.raises(FileNotFoundError):
                files.open(wrong)
            with pytest.raises(FileNotFoundError):
                files.ls(wrong)
        with pytest.raises(NotImplementedError):
            files.open("disk", "wb")


def test_fsspec_finds_it_by_its_name_and_chains(image: Path) -> None:
    files = fsspec.filesystem("tapfs", image=str(image))
    assert files.cat_file("disk", 4, 8) == b"\0\0\0\1"
    files.close()
    with fsspec.open(f"tapfs://disk::file://{image}") as file:
        file.seek(8)
        assert file.read(4) == b"\0\0\0\2"
    with pytest.raises(ValueError, match="the image is missing"):
        TapfsFileSystem()


def test_a_file_system_that_fsspec_drops_closes_its_images_without_a_word(image: Path) -> None:
    """Also as a part of a circle, in which Python ends the images before the file system that owns them."""
    tapfs.create_snapshot(image, "monday")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        files = fsspec.filesystem("tapfs", image=str(image))
        files.cat_file("snapshots/monday", 0, 4)
        files.circle = files
        del files
        gc.collect()
    assert [str(each.message) for each in told] == []
    tapfs.open(image, writable=True).close()  # nothing has it open any more
