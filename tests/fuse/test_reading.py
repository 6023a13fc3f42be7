"""The tree of a read-only mount: names, sizes, modes, bytes."""

from __future__ import annotations

import errno
import json
import os
import random
import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import Fixture, sha256_of
from tests.fuse.conftest import Mounts, refused


def test_tree(mounts: Mounts, sample: Path) -> None:
    directory = mounts.mount(sample)
    assert os.listdir(directory) == ["disk", "info.json"]
    disk = (directory / "disk").stat()
    assert stat.filemode(disk.st_mode) == "-r--------"
    assert disk.st_size == sample.stat().st_size
    assert disk.st_mtime_ns == sample.stat().st_mtime_ns
    assert (disk.st_uid, disk.st_gid) == (os.getuid(), os.getgid())
    assert stat.filemode((directory / "info.json").stat().st_mode) == "-r--r--r--"
    assert stat.filemode(directory.stat().st_mode) == "dr-xr-xr-x"
    assert not (directory / "other").exists()
    assert (directory / "..").resolve() == directory.parent
    assert os.statvfs(directory).f_blocks * 4096 >= disk.st_size
    mounts.umount(directory)


def test_raw_is_identical(mounts: Mounts, sample: Path) -> None:
    directory = mounts.mount(sample)
    assert (directory / "disk").read_bytes() == sample.read_bytes()
    mounts.umount(directory)


@pytest.mark.parametrize(
    "name",
    [
        "standalone-2007-le-l1",
        "standalone-2008-be-l1-noflag",
        "sparse-2007-le-l1",
        "overlay-2007-le-l1",
        "overlay-2006-12byte-ext",
        "empty-2007-sparse",
        "empty-2007-reserved",
        "empty-2010-oversized-l1",
    ],
)
def test_fixture_is_identical(mounts: Mounts, blktap_images: dict[str, Fixture], name: str) -> None:
    image = blktap_images[name]
    backing = [] if image.backing is None else ["--backing", image.backing, "--backing-format", "raw"]
    directory = mounts.mount(image.path, *backing)
    assert sha256_of(directory / "disk") == image.guest_sha256
    shown = mounts.run("info", "--json", *backing, image.path)
    assert (directory / "info.json").read_text() == shown.out
    assert json.loads(shown.out)["virtual_size"] == (directory / "disk").stat().st_size
    mounts.umount(directory)


def test_every_fixture_is_tested(blktap_images: dict[str, Fixture]) -> None:
    marks = test_fixture_is_identical.pytestmark  # type: ignore[attr-defined]
    assert set(marks[0].args[1]) == set(blktap_images)


def test_read_only_refuses_everything(mounts: Mounts, sample: Path) -> None:
    before = sha256_of(sample)
    directory = mounts.mount(sample)
    for attempt in (
        lambda: os.open(directory / "disk", os.O_RDWR),
        lambda: os.open(directory / "disk", os.O_WRONLY | os.O_TRUNC),
        lambda: os.open(directory / "info.json", os.O_WRONLY),
        lambda: os.truncate(directory / "disk", 0),
        lambda: os.unlink(directory / "disk"),
        lambda: os.mkdir(directory / "new"),
        lambda: os.open(directory / "new", os.O_WRONLY | os.O_CREAT),
    ):
        with refused(errno.EROFS, errno.EACCES):
            attempt()
    mounts.umount(directory)
    assert sha256_of(sample) == before


def test_unaligned_reads_and_the_end(mounts: Mounts, sample: Path) -> None:
    content = sample.read_bytes()
    directory = mounts.mount(sample)
    descriptor = os.open(directory / "disk", os.O_RDONLY)
    try:
        choice = random.Random(1)
        for _ in range(200):
            offset = choice.randrange(len(content) + 1000)
            length = choice.choice([1, 511, 4096, 100_000])
            assert os.pread(descriptor, length, offset) == content[offset : offset + length]
    finally:
        os.close(descriptor)
    mounts.umount(directory)


def test_direct_reads(mounts: Mounts, blktap_images: dict[str, Fixture]) -> None:
    directory = mounts.mount(blktap_images["standalone-2007-le-l1"].path)
    command = ["dd", f"if={directory}/disk", "iflag=direct", "bs=64k", "status=none"]
    copied = subprocess.run(command, capture_output=True, check=True).stdout
    assert copied == (directory / "disk").read_bytes()
    mounts.umount(directory)


def test_concurrent_readers(mounts: Mounts, blktap_images: dict[str, Fixture]) -> None:
    image = blktap_images["standalone-2007-le-l1"]
    directory = mounts.mount(image.path)
    with ThreadPoolExecutor(16) as pool:
        sums = list(pool.map(lambda _: sha256_of(directory / "disk"), range(32)))
    assert set(sums) == {image.guest_sha256}
    mounts.umount(directory)


def test_corrupt_table_is_an_error_of_the_read_only(mounts: Mounts, tmp_path: Path) -> None:
    image = tmp_path / "image.qcow"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow", image, "16M"], check=True)
    subprocess.run(["qemu-io", "-f", "qcow", "-c", "write 0 64k", image], check=True, capture_output=True)
    data = bytearray(image.read_bytes())
    l1 = int.from_bytes(data[40:48], "big")
    l2 = int.from_bytes(data[l1 : l1 + 8], "big")
    data[l2 : l2 + 8] = (1 << 40).to_bytes(8, "big")  # a cluster far past the end
    image.write_bytes(data)
    directory = mounts.mount(image, "-f", "qcow")
    with (directory / "disk").open("rb") as disk:
        with refused(errno.EUCLEAN):
            disk.read(4096)
        disk.seek(8 << 20)
        assert disk.read(4096) == bytes(4096)
    mounts.umount(directory)


@pytest.mark.usefixtures("root")
def test_loop_mount(mounts: Mounts, blktap_images: dict[str, Fixture], tmp_path: Path) -> None:
    flat, image = blktap_images["overlay-2007-le-l1"].backing, tmp_path / "image.qcow"
    assert mounts.run("convert", "-f", "raw", "-O", "qcow", flat, image).code == 0
    directory = mounts.mount(image)
    inside = tmp_path / "inside"
    inside.mkdir()
    subprocess.run(["mount", "-o", "loop,ro", directory / "disk", inside], check=True)
    try:
        assert "numbers.txt" in os.listdir(inside / "docs")
        assert (inside / "hello.txt").read_bytes()
        # The loop device keeps the mount busy, and the message says so.
        busy = mounts.run("umount", directory)
        assert busy.code == 15
        assert "/dev/loop" in busy.err
    finally:
        subprocess.run(["umount", inside], check=True)
    mounts.umount(directory)
