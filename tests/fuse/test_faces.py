"""`tapfs mount --as`: the disk as the files of images, which others read as any image."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

import tapfs
from tests.conftest import Ran
from tests.fuse.conftest import Mounts, refused

FACES = {"qcow2": "qcow2", "vhdx": "vhdx", "vmdk": "vmdk", "vdi": "vdi", "vhd": "vpc"}
SIZE = 12 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A qcow image with data here and there."""
    path, raw = tmp_path / "image.qcow", tmp_path / "disk.raw"
    with raw.open("wb") as file:
        file.truncate(SIZE)
        for offset in (0, 5 << 20, SIZE - 70_000):
            file.seek(offset)
            file.write(random.Random(offset).randbytes(70_000))
    tapfs.convert(raw, path, target_format="qcow", format="raw")
    return path


def test_qemu_and_7zip_read_each_face(mounts: Mounts, image: Path, tmp_path: Path) -> None:
    directory = mounts.mount(image, "--as", ",".join(FACES))
    assert sorted(os.listdir(directory)) == sorted(["disk", "info.json", *(f"disk.{name}" for name in FACES)])
    for name, of_qemu in FACES.items():
        face = directory / f"disk.{name}"
        words = ["qemu-img", "compare", "-f", of_qemu, "-F", "raw", face, tmp_path / "disk.raw"]
        subprocess.run(words, check=True, capture_output=True)
        if name in {"qcow2", "vmdk"}:
            subprocess.run(["qemu-img", "check", "-q", "-f", of_qemu, face], check=True)
        with refused(errno.EROFS):
            os.open(face, os.O_RDWR)
    unpacked = subprocess.run(
        ["7zz", "e", "-so", "-tvmdk", directory / "disk.vmdk"], capture_output=True, check=True
    ).stdout
    assert unpacked == (tmp_path / "disk.raw").read_bytes()
    (entry,) = [each for each in _listed(mounts) if each["mountpoint"] == str(directory)]
    assert entry["faces"] == ",".join(FACES)
    mounts.umount(directory)


def _listed(mounts: Mounts) -> list[dict[str, object]]:
    ran: Ran = mounts.run("list", "--json")
    document = json.loads(ran.out)
    listed: list[dict[str, object]] = document["mounts"] if isinstance(document, dict) else document
    return listed


def test_what_cannot_be_shown_is_refused_before_the_mount(mounts: Mounts, image: Path) -> None:
    directory = mounts.directory()
    for words, said in (
        (["--rw", "--as", "vhd"], "read-only mounts"),
        (["--temp", "--as", "vhd"], "read-only mounts"),
        (["--files", "--as", "vhd"], "not with --files"),
        (["--as", "vhd,"], "names of formats"),
        (["--as", "raw"], "no face of the format raw"),
        (["--as", "dmg"], "does not make dmg images"),
    ):
        ran = mounts.run("mount", *words, image, directory)
        assert ran.code != 0
        assert said in ran.err
    directory.rmdir()


def test_a_face_that_cannot_be_made_is_an_error_by_itself(mounts: Mounts, image: Path) -> None:
    """One entry of a table is damaged: the disk is shown, and only who looks at the face meets it."""
    damaged = image.with_suffix(".qcow2")
    tapfs.convert(image, damaged, target_format="qcow2")
    data = bytearray(damaged.read_bytes())
    first_table = int.from_bytes(data[40:48], "big")
    second_table = int.from_bytes(data[first_table : first_table + 8], "big") & ((1 << 56) - 1)
    entry = second_table + 8 * ((5 << 20) >> 16)
    data[entry : entry + 8] = ((1 << 63) + 512).to_bytes(8, "big")
    damaged.write_bytes(data)
    directory = mounts.mount(damaged, "--as", "vdi")
    assert "disk.vdi" in os.listdir(directory)
    with refused(errno.EUCLEAN):
        os.stat(directory / "disk.vdi")
    assert (directory / "info.json").read_bytes()
    mounts.umount(directory)


def test_a_seek_in_other_files_leaves_the_holes_of_the_disk(mounts: Mounts, image: Path) -> None:
    directory = mounts.mount(image, "--engine", "native", "--as", "vdi")
    for name in ("info.json", "disk.vdi"):
        with (directory / name).open("rb") as file, suppress(OSError):
            os.lseek(file.fileno(), 0, os.SEEK_DATA)
    with (directory / "disk").open("rb") as file:
        assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) < SIZE
    mounts.umount(directory)
