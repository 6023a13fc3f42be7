"""`tapfs.mount` and `tapfs.unmount` from a Python program, which may have threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import tapfs
from tapfs import ErrorKind, ImageError
from tests.fuse.conftest import MIB, ext4
from tests.unit.partitions.test_tables import partitioned

SIZE = 2 << 20


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TAPFS_RUNTIME_DIR", str(tmp_path / "runtime"))
    yield
    assert not (tmp_path / "m").is_mount()


@pytest.fixture
def mountpoint(tmp_path: Path) -> Path:
    (tmp_path / "m").mkdir()
    return tmp_path / "m"


@pytest.fixture
def qcow(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow"
    tapfs.create(path, "qcow", SIZE)
    return path


def test_a_program_with_threads_mounts_writes_and_unmounts(qcow: Path, mountpoint: Path) -> None:
    ending = threading.Event()
    other = threading.Thread(target=ending.wait)
    other.start()
    try:
        with tapfs.mount(qcow, mountpoint, writable=True) as mounted:
            assert os.fspath(mounted) == str(mountpoint)
            assert mounted.disk == str(mountpoint / "disk")
            assert mounted.partition(1) == str(mountpoint / "part1")
            with open(mounted.disk, "r+b") as disk:
                disk.write(b"written through the mount")
    finally:
        ending.set()
        other.join()
    with tapfs.open(qcow) as image:
        assert image.read(0, 7) == b"written"


def test_the_error_of_the_mounting_process_is_raised(qcow: Path, mountpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as missing:
        tapfs.mount(tmp_path / "-missing", mountpoint)
    assert missing.value.filename == str(tmp_path / "-missing")
    with (
        tapfs.open(qcow, writable=True),
        pytest.raises(ImageError) as locked,
    ):
        tapfs.mount(qcow, mountpoint, writable=True)
    assert locked.value.kind is ErrorKind.LOCKED
    raw = tmp_path / "disk.raw"
    raw.write_bytes(bytes(SIZE))
    with pytest.raises(ImageError, match="format='raw'"):
        tapfs.mount(raw, mountpoint, writable=True)
    with pytest.raises(ImageError) as nothing:
        tapfs.unmount(mountpoint)
    assert nothing.value.kind is ErrorKind.NOT_FOUND


def test_a_password_reaches_the_image_and_nobody_else(tmp_path: Path, mountpoint: Path) -> None:
    path = tmp_path / "secret.qcow"
    tapfs.create(path, "qcow", SIZE, password=b"pass\xffword")
    with tapfs.open(path, writable=True, password=b"pass\xffword") as disk:
        disk.write(0, b"plain")
    with tapfs.mount(path, mountpoint, password=b"pass\xffword", engine="native") as mounted:
        assert Path(mounted.disk).read_bytes()[:5] == b"plain"
    with pytest.raises(PermissionError, match="encrypted"):
        tapfs.mount(path, mountpoint)
    with pytest.raises(TypeError, match="bytes, not str"):
        tapfs.mount(path, mountpoint, password="password")  # type: ignore[arg-type]  # noqa: S106


def test_options_go_to_the_mount(qcow: Path, mountpoint: Path) -> None:
    with tapfs.mount(qcow, mountpoint, temporary=True, options=["umask=0137"], shared=True) as mounted:
        assert os.stat(mounted.disk).st_mode & 0o777 == 0o640
        with open(mounted.disk, "r+b") as disk:
            disk.write(b"gone at the end")
    with tapfs.open(qcow) as image:
        assert image.read(0, 4) == bytes(4)
    with pytest.raises(TypeError, match="not one str"):
        tapfs.mount(qcow, mountpoint, options="ro")
    with pytest.raises(ValueError, match="no such mount option"):
        tapfs.mount(qcow, mountpoint, options=["nonsense"])


def test_a_table_in_large_sectors(tmp_path: Path, mountpoint: Path, content: Path) -> None:
    """An error and its advice name the option as Python has it."""
    disk = partitioned(tmp_path / "disk", "label: dos\nstart=256, size=5120\n")
    ext4(disk, content, 20, MIB)
    with pytest.raises(ImageError, match="say sector_size=4096") as nothing:
        tapfs.mount(disk, mountpoint, files=True)
    assert nothing.value.filename == str(disk)
    with tapfs.mount(disk, mountpoint, files=True, sector_size=4096):
        assert (mountpoint / "text").read_text() == "hello\n"
    with tapfs.open_file(disk, partition=1, sector_size=4096, format="raw") as part:
        part.seek(1024 + 56)
        assert part.read(2) == b"\x53\xef"
    table = disk.read_bytes()[:512]
    ext4(disk, content, 64)
    with disk.open("r+b") as file:
        file.write(table)
    with pytest.raises(ImageError, match="choose one with partition=N") as choice:
        tapfs.mount(disk, mountpoint, files=True, sector_size=4096)
    assert choice.value.kind is ErrorKind.INVALID_ARGUMENT


def test_reads_are_verified_where_a_program_asks_for_it(qcow: Path, mountpoint: Path, tmp_path: Path) -> None:
    with tapfs.open(qcow, writable=True) as disk:
        disk.write(0, b"hashed" * 1000)
        (extent, *_) = (each for each in disk.extents() if each.host_offset is not None)
    sidecar = tmp_path / "digests"
    tapfs.write_sidecar(qcow, sidecar)
    with tapfs.mount(qcow, mountpoint, verify_reads=True, sidecar=sidecar) as mounted, open(mounted.disk, "rb") as file:
        assert file.read(6) == b"hashed"
    with qcow.open("r+b") as image:
        image.seek(extent.host_offset or 0)
        image.write(b"spoiled")
    with (
        tapfs.mount(qcow, mountpoint, verify_reads=True, sidecar=sidecar) as mounted,
        open(mounted.disk, "rb", buffering=0) as file,
        pytest.raises(OSError, match="Input/output error"),
    ):
        file.read(6)
    with pytest.raises(ValueError, match="read-only"):
        tapfs.mount(qcow, mountpoint, verify_reads=True, writable=True)


def test_snapshots_are_shown_by_pyfuse3_as_well(mountpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    tapfs.create(path, "qcow2", SIZE)
    with tapfs.open(path, writable=True) as disk:
        disk.write(0, b"before")
    tapfs.create_snapshot(path, "monday")
    with tapfs.mount(path, mountpoint, writable=True, engine="pyfuse3") as mounted:
        with open(mounted.disk, "r+b") as file:
            file.write(b"after!")
        assert (mountpoint / "snapshots" / "monday").read_bytes()[:6] == b"before"
        assert Path(mounted.disk).read_bytes()[:6] == b"after!"
