"""tapfs and QEMU keep each other's writers out, and tapfs names the process."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import tapfs
from tapfs import ErrorKind, ImageError, NewImage


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow"
    tapfs.create_image(str(path), NewImage("qcow", 1 << 20))
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


def test_readers_bear_each_other_but_no_writer(image: Path) -> None:
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
