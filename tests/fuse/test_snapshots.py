"""The snapshots of an image as files of its mount: they stay what they are while the disk beside them is written."""

from __future__ import annotations

import errno
import os
import random
import subprocess
from pathlib import Path

import pytest

import tapfs
from tapfs.driver import SnapshotRecord
from tapfs.fuse.kept_disks import file_names
from tests.fuse.conftest import Mounts, refused

SIZE = 8 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image with the snapshots "one" and "a/b", over a parent."""
    base, path = tmp_path / "base.raw", tmp_path / "image.qcow2"
    base.write_bytes(random.Random(1).randbytes(SIZE))
    words = [
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        str(base),
        "-F",
        "raw",
        "-o",
        "cluster_size=4096",
        str(path),
    ]
    subprocess.run(words, check=True)
    for number, name in enumerate(("one", "a/b")):
        written(path, number)
        tapfs.create_snapshot(path, name)
    written(path, 2)
    return path


def written(path: Path, seed: int) -> None:
    choice = random.Random(seed)
    with tapfs.open(path, writable=True) as disk:
        for _ in range(30):
            disk.write(choice.randrange(SIZE - 20_000), choice.randbytes(choice.choice([100, 20_000])))


def whole(path: Path, snapshot: str | None = None) -> bytes:
    with tapfs.open(path, snapshot=snapshot) as disk:
        return disk.read(0, disk.size)


def test_each_is_a_file_that_nobody_writes(mounts: Mounts, image: Path) -> None:
    kept = {name: whole(image, name) for name in ("one", "a/b")}
    made = {each.name: each.seconds for each in tapfs.snapshots(image)}
    directory = mounts.mount(image)
    assert sorted(os.listdir(directory)) == ["disk", "info.json", "snapshots"]
    assert sorted(os.listdir(directory / "snapshots")) == ["a%2Fb", "one"]
    for file, name in (("one", "one"), ("a%2Fb", "a/b")):
        path = directory / "snapshots" / file
        assert path.stat().st_size == SIZE
        assert int(path.stat().st_mtime) == made[name]
        assert path.read_bytes() == kept[name]
        with refused(errno.EROFS):
            os.open(path, os.O_RDWR)
    mounts.umount(directory)
    directory = mounts.mount(image, "--rw")
    path = directory / "snapshots" / "one"
    with refused(errno.EROFS):
        os.open(path, os.O_RDWR)
    for size in (0, SIZE // 2):
        with refused(errno.EPERM):
            os.truncate(path, size)
    with refused(errno.EPERM):
        (directory / "snapshots" / "new").touch()
    mounts.umount(directory)


def test_they_stay_while_the_disk_is_written(mounts: Mounts, image: Path) -> None:
    """A cluster that a snapshot shares is never written in place, whatever is open when."""
    kept = {name: whole(image, name) for name in ("one", "a/b")}
    expected = bytearray(whole(image))
    directory = mounts.mount(image, "--rw")
    early = open(directory / "snapshots" / "one", "rb")  # noqa: SIM115 - it is closed below
    choice = random.Random(5)
    with open(directory / "disk", "r+b", buffering=0) as disk:
        for number in range(60):
            offset, data = choice.randrange(SIZE - 20_000), choice.randbytes(choice.choice([512, 20_000]))
            disk.seek(offset)
            disk.write(data)
            expected[offset : offset + len(data)] = data
            if number % 20 == 10:
                os.fsync(disk.fileno())
                assert early.read(SIZE) + early.read() == kept["one"]
                os.posix_fadvise(early.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                early.seek(0)
                assert (directory / "snapshots" / "a%2Fb").read_bytes() == kept["a/b"]
    early.close()
    assert (directory / "disk").read_bytes() == expected
    mounts.umount(directory)
    assert whole(image) == expected
    assert {name: whole(image, name) for name in kept} == kept
    assert mounts.run("check", "-q", image).code == 0


def test_under_a_temporary_overlay_they_are_those_of_the_image(mounts: Mounts, image: Path) -> None:
    kept = whole(image, "one")
    directory = mounts.mount(image, "--temp")
    with open(directory / "disk", "r+b") as disk:
        disk.write(b"scratch" * 1000)
    assert (directory / "snapshots" / "one").read_bytes() == kept
    mounts.umount(directory)


def test_an_image_without_snapshots_has_no_folder_of_them(mounts: Mounts, tmp_path: Path) -> None:
    path = tmp_path / "plain.qcow2"
    assert mounts.run("create", "-q", "-f", "qcow2", path, "1M").code == 0
    directory = mounts.mount(path)
    assert sorted(os.listdir(directory)) == ["disk", "info.json"]
    mounts.umount(directory)


def test_one_that_cannot_be_opened_is_an_error_of_its_file_alone(mounts: Mounts, image: Path) -> None:
    data = bytearray(image.read_bytes())
    entry = int.from_bytes(data[64:72], "big")
    data[entry : entry + 8] = (1 << 40).to_bytes(8, "big")
    image.write_bytes(data)
    directory = mounts.mount(image)
    with refused(errno.EUCLEAN):
        (directory / "snapshots" / "one").read_bytes()
    assert len((directory / "snapshots" / "a%2Fb").read_bytes()) == SIZE
    mounts.umount(directory)


@pytest.mark.parametrize(
    ("named", "files"),
    [
        ([("1", "a"), ("2", "b")], [b"a", b"b"]),
        ([("1", ""), ("2", "."), ("3", "..")], [b"1", b"%2E", b"%2E%2E"]),
        ([("1", "a/b"), ("2", "a%2Fb"), ("3", "new\nline")], [b"a%2Fb", b"a%252Fb", b"new%0Aline"]),
        ([("1", "a"), ("2", "a"), ("2", "a")], [b"a", b"id=2", b"number=2"]),
        ([("7", "x" * 300), ("8", "/" * 90)], [b"id=7", b"id=8"]),
        ([("1", "\udcff\u00e9")], [b"\xff\xc3\xa9"]),
    ],
)
def test_names_of_files(named: list[tuple[str, str]], files: list[bytes]) -> None:
    assert file_names([SnapshotRecord(each, name, 0, 0, 0, 0, 0) for each, name in named]) == files
