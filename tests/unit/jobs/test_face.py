"""The face of a disk is the file of an image: its metadata is made up, its data is read from the disk."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tapfs as api
from tapfs import ErrorKind, ImageError
from tapfs.jobs.face import Birth, Face, made_face, require_face

Run = Callable[..., Any]
FORMATS = ["qcow", "qcow2", "vhd", "vhdx", "vdi", "vmdk"]
MIB = 1 << 20
SIZE = 40 * MIB + 512
BIRTH = Birth(b"seed", 1_700_000_000)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw file with holes: data at odd places, small and large, and at the end."""
    path = tmp_path_factory.mktemp("disk") / "disk.raw"
    noise = random.Random(4)
    with path.open("wb") as file:
        file.truncate(SIZE)
        for offset, length in ((0, 5000), (3 * MIB - 4096, 2 * MIB), (17 * MIB + 512, 100_000), (SIZE - 512, 512)):
            file.seek(offset)
            file.write(noise.randbytes(length))
    return path


def whole(face: Face, length: int) -> bytes:
    return b"".join(face.read(at, length) for at in range(0, face.size, length))


@pytest.mark.parametrize("name", FORMATS)
def test_it_is_an_image_with_the_same_disk(tapfs: Run, disk: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "image"
    with api.open(disk, format="raw") as image:
        face = made_face(image, name, image, BIRTH)
        content = whole(face, MIB)
        path.write_bytes(content)
        noise = random.Random(5)
        for _ in range(100):
            start, length = noise.randrange(face.size), noise.randrange(200_000)
            wanted = content[start : start + length]
            assert face.read(start, length) == wanted
            assert face.try_read(start, length) in (wanted, None)
        assert face.read(face.size, 100) == b""
        face.close()
    assert len(content) < SIZE
    assert tapfs("check", "-q", path).code == 0
    assert tapfs("compare", "-F", "raw", "-s", path, disk).code == 0


@pytest.mark.parametrize("name", FORMATS)
def test_it_is_the_same_however_often_it_is_made(disk: Path, name: str) -> None:
    def made(birth: Birth) -> bytes:
        with api.open(disk, format="raw") as image:
            face = made_face(image, name, image, birth)
            content = whole(face, MIB)
            face.close()
            return content

    again = made(BIRTH)
    assert made(BIRTH) == again
    without_identifiers = name in {"qcow", "qcow2"}
    assert (made(BIRTH._replace(seed=b"another")) == again) == without_identifiers


def test_it_reads_none_of_the_data_to_be_made_and_only_data_that_is_wanted(disk: Path) -> None:
    read: list[tuple[int, int]] = []
    with api.open(disk, format="raw") as image:

        class Reader:
            def read(self, offset: int, length: int) -> bytes:
                read.append((offset, length))
                return image.read(offset, length)

            def try_read(self, offset: int, length: int) -> bytes | None:
                return image.try_read(offset, length)

        face = made_face(image, "qcow2", Reader(), BIRTH)
        assert not read
        data = [run for run in face.runs() if run.offset is not None]
        assert sum(run.length for run in face.runs()) == face.size
        assert face.read(data[1].start + 100, 50) == image.read((data[1].offset or 0) + 100, 50)
        assert read == [((data[1].offset or 0) + 100, 50)]
        face.close()


def test_a_chain_has_a_face_without_a_parent(tapfs: Run, disk: Path, tmp_path: Path) -> None:
    overlay, path = tmp_path / "overlay.qcow2", tmp_path / "face.vhdx"
    assert tapfs("create", "-f", "qcow2", "-b", disk, "-F", "raw", overlay).code == 0
    with api.open(overlay, writable=True) as image:
        image.write(20 * MIB, b"over" * 1000)
        image.write_zeroes(3 * MIB, MIB)
    with api.open(overlay) as image:
        face = made_face(image, "vhdx", image, BIRTH)
        path.write_bytes(whole(face, 3 * MIB + 1))
        face.close()
    assert api.info(path)["backing"] is None
    assert tapfs("compare", "-s", overlay, path).code == 0


def test_a_disk_of_terabytes_costs_its_data_only(tmp_path: Path) -> None:
    path = tmp_path / "huge.raw"
    with path.open("wb") as file:
        file.truncate(1 << 40)
        file.seek(700 << 30)
        file.write(b"far")
    for name in ("qcow2", "vhdx", "vhd", "vdi"):
        with api.open(path, format="raw") as image:
            face = made_face(image, name, image, BIRTH)
            runs = list(face.runs())
            assert len(runs) < 10
            assert any(run.offset is not None and face.read(run.start, 3) == b"far" for run in runs) or name == "vhd"
            face.close()


def test_what_has_no_face_is_refused_before_anything_is_made(disk: Path) -> None:
    assert disk.exists()
    for name in ("raw", "ram", "luks", "dmg", "none"):
        with pytest.raises(ImageError) as caught:
            require_face(name, MIB)
        assert caught.value.kind is ErrorKind.UNSUPPORTED
    with pytest.raises(ImageError):
        require_face("vhd", 3 << 40)
    require_face("vhdx", 3 << 40)


def test_a_disk_that_is_no_whole_number_of_sectors_ends_in_zeros(tmp_path: Path) -> None:
    path = tmp_path / "odd.raw"
    path.write_bytes(b"\1" * 100_100)
    for name in FORMATS:
        with api.open(path, format="raw") as image:
            face = made_face(image, name, image, BIRTH)
            (tmp_path / name).write_bytes(whole(face, MIB))
            face.close()
        with api.open(tmp_path / name) as image:
            assert image.read(0, image.size) == (b"\1" * 100_100).ljust(image.size, b"\0")


def test_a_closed_face_is_an_error(disk: Path) -> None:
    with api.open(disk, format="raw") as image:
        face = made_face(image, "vdi", image, BIRTH)
        descriptors = len(os.listdir("/proc/self/fd"))
        face.close()
        face.close()
        assert len(os.listdir("/proc/self/fd")) == descriptors - 1
        with pytest.raises(ImageError):
            face.read(0, 1)
