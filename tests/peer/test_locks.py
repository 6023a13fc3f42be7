"""tapfs and QEMU keep each other's writers out, and tapfs names the process."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import tapfs
from tapfs import ErrorKind, Image, ImageError
from tapfs.disk.chain import OpenOptions
from tapfs.disk.opening import open_image
from tapfs.host.lock import Sharing, only_read_from_now_on, refuse_other_writers


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow"
    tapfs.create(str(path), "qcow", 1 << 20)
    return path


@contextmanager
def qemu_io(image: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        ["qemu-io", *options, "-f", "qcow", str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("length\n")
        process.stdin.flush()
        assert "1 MiB" in process.stdout.readline()
        yield process
        process.stdin.close()


@pytest.mark.parametrize("writable", [True, False])
def test_a_writer_of_qemus_is_refused_company_and_named(image: Path, *, writable: bool) -> None:
    with qemu_io(image) as process, pytest.raises(ImageError) as raised:
        tapfs.open(image, writable=writable)
    assert raised.value.kind is ErrorKind.LOCKED
    assert f"process {process.pid} (qemu-io)" in str(raised.value)


def test_shared_looks_all_the_same(image: Path) -> None:
    with qemu_io(image), tapfs.open(image, shared=True) as disk:
        assert disk.read(0, 512) == bytes(512)


def test_readers_let_each_other_in_but_no_writer(image: Path) -> None:
    with qemu_io(image, "-r"), tapfs.open(image) as disk:
        assert disk.read(0, 512) == bytes(512)
        with pytest.raises(ImageError) as raised:
            tapfs.open(image, writable=True)
    assert raised.value.kind is ErrorKind.LOCKED
    assert f"process {os.getpid()}" in str(raised.value)


@pytest.mark.parametrize("writable", [True, False])
def test_qemu_keeps_out_of_what_tapfs_uses(image: Path, *, writable: bool) -> None:
    with tapfs.open(image, writable=writable):
        refused = subprocess.run(
            ["qemu-io", "-f", "qcow", "-c", "write 0 512", str(image)], capture_output=True, text=True, check=False
        )
    assert refused.returncode == 1
    assert "lock" in refused.stderr
    with tapfs.open(image, writable=True):
        refused = subprocess.run(["qemu-img", "info", str(image)], capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "lock" in refused.stderr


def test_the_lock_ends_with_the_image(image: Path) -> None:
    tapfs.open(image, writable=True).close()
    subprocess.run(["qemu-io", "-f", "qcow", "-c", "write 0 512", str(image)], check=True, capture_output=True)
    tapfs.open(image, writable=True).close()


def opened_with(image: Path, sharing: Sharing, *, writable: bool = False) -> Image:
    return open_image(str(image), OpenOptions(format="qcow", writable=writable, sharing=sharing))


def test_a_reader_with_cooperating_writers_lets_them_in_but_no_exclusive_writer(image: Path) -> None:
    with (
        opened_with(image, Sharing.UNCHECKED, writable=True),
        opened_with(image, Sharing.WITH_COOPERATING_WRITERS) as disk,
    ):
        assert disk.read(0, 512) == bytes(512)
        # Another one beside both, and one who comes to share.
        with opened_with(image, Sharing.WITH_COOPERATING_WRITERS), opened_with(image, Sharing.UNCHECKED, writable=True):
            pass
    with qemu_io(image) as process, pytest.raises(ImageError) as raised:
        opened_with(image, Sharing.WITH_COOPERATING_WRITERS)
    assert raised.value.kind is ErrorKind.LOCKED
    assert f"process {process.pid} (qemu-io)" in str(raised.value)
    with tapfs.open(image, writable=True), pytest.raises(ImageError):
        opened_with(image, Sharing.WITH_COOPERATING_WRITERS)


def test_who_writes_alone_is_refused_beside_a_reader_with_sharers(image: Path) -> None:
    with opened_with(image, Sharing.WITH_COOPERATING_WRITERS):
        with pytest.raises(ImageError) as raised:
            tapfs.open(image, writable=True)
        assert raised.value.kind is ErrorKind.LOCKED
        refused = subprocess.run(
            ["qemu-io", "-f", "qcow", "-c", "write 0 512", str(image)], capture_output=True, text=True, check=False
        )
        assert refused.returncode == 1
        assert "lock" in refused.stderr
        # Readers of any kind are welcome.
        subprocess.run(["qemu-img", "info", str(image)], check=True, capture_output=True)
        tapfs.open(image).close()


def test_who_writes_alone_is_refused_beside_sharers(image: Path) -> None:
    with opened_with(image, Sharing.UNCHECKED, writable=True), pytest.raises(ImageError):
        tapfs.open(image, writable=True)


def test_other_writers_are_found(image: Path) -> None:
    with opened_with(image, Sharing.UNCHECKED, writable=True) as mine:
        descriptor = mine.layers[0].file.descriptor
        refuse_other_writers(descriptor, str(image))
        with opened_with(image, Sharing.UNCHECKED, writable=True), pytest.raises(ImageError) as raised:
            refuse_other_writers(descriptor, str(image))
        assert raised.value.kind is ErrorKind.LOCKED


def test_what_is_only_read_from_now_on_can_be_read_by_others(image: Path) -> None:
    with tapfs.open(image, writable=True) as mine:
        refused = subprocess.run(["qemu-img", "info", str(image)], capture_output=True, text=True, check=False)
        assert refused.returncode == 1
        only_read_from_now_on(mine.layers[0].file.descriptor)
        subprocess.run(["qemu-img", "info", str(image)], check=True, capture_output=True)
        tapfs.open(image).close()
        with pytest.raises(ImageError):
            tapfs.open(image, writable=True)


def test_direct_requests_that_outlive_their_process(tmp_path: Path) -> None:
    """The kernel goes on with them, and they keep their open file: who serves the disk next has to wait for them."""
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(1 << 20))

    def served(disk: int, sharing: Sharing = Sharing.UNCHECKED) -> Image:
        return open_image(
            str(path), OpenOptions(format="raw", writable=True, direct=True, request_owner=disk, sharing=sharing)
        )

    for sharing in (Sharing.UNCHECKED, Sharing.EXCLUSIVE):
        with served(7, sharing) as image:
            late = os.dup(image.layers[0].file.data_descriptor)
        try:
            with pytest.raises(ImageError) as caught:
                served(7, sharing)
            assert caught.value.kind is ErrorKind.LOCKED
            assert "process that served the disk before" in str(caught.value)
            served(8, sharing).close()
        finally:
            os.close(late)
        served(7, sharing).close()
