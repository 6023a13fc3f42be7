"""Host files are judged before they are opened, and no offset that an image names reaches the host unchecked."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import tapfs
from tapfs import ErrorKind, ImageError
from tapfs.host.file import LocalFile

MIB = 1 << 20


@contextmanager
def loop_device(path: Path, *options: str) -> Iterator[str]:
    """A file as a block device."""
    setup = ["losetup", "--find", "--show", *options, str(path)]
    device = subprocess.run(setup, check=True, capture_output=True, text=True).stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def test_a_read_only_device_is_not_opened_for_writing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(MIB))
    with loop_device(disk, "--read-only") as device:
        for use in (
            lambda: tapfs.open(device, format="raw", writable=True),
            lambda: tapfs.create(device, "raw", MIB, overwrite=True),
        ):
            with pytest.raises(ImageError) as raised:
                use()
            assert raised.value.kind is ErrorKind.READ_ONLY
        tapfs.open(device).close()
    with loop_device(disk) as device, tapfs.open(device, format="raw", writable=True) as opened:
        opened.write(0, b"x")


def test_a_file_that_a_loop_device_shows_is_not_written(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(MIB))
    (tmp_path / "link").hardlink_to(disk)
    for options in ((), ("--read-only",)):
        with loop_device(disk, *options) as device:
            for use in (
                lambda: tapfs.open(tmp_path / "link", format="raw", writable=True),
                lambda: tapfs.create(str(disk), "raw", MIB, overwrite=True),
            ):
                with pytest.raises(ImageError) as raised:
                    use()
                assert raised.value.kind is ErrorKind.LOCKED
                assert device in str(raised.value)
            tapfs.open(disk, format="raw").close()
            tapfs.open(disk, format="raw", writable=True, shared=True).close()
    tapfs.open(disk, format="raw", writable=True).close()


@pytest.mark.parametrize("offset", [4096, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 80])
def test_what_lies_past_the_end_is_the_end(tmp_path: Path, offset: int) -> None:
    (tmp_path / "a").write_bytes(b"x" * 4096)
    file = LocalFile.open(str(tmp_path / "a"))
    try:
        assert file.read(offset, 512) == b""
        assert file.read(4000, 1 << 70 if offset >= 1 << 63 else 512) == b"x" * 96
        assert list(file.data_ranges(offset, 512)) == []
    finally:
        file.close()


def test_what_is_no_file_is_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    opened = opened_names(monkeypatch)
    for path in (str(fifo), "/dev/null", str(tmp_path)):
        for writable in (False, True):
            with pytest.raises(ImageError) as raised:
                tapfs.open(path, writable=writable)
            assert raised.value.kind is ErrorKind.INVALID_FORMAT
    assert not {str(fifo), "/dev/null", str(tmp_path)} & set(opened)


def opened_names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The real names of what is opened from now on, looks (O_PATH) apart."""
    names: list[str] = []
    original = os.open

    def recorded(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        descriptor = original(path, flags, mode, dir_fd=dir_fd)
        if not flags & os.O_PATH:
            names.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        return descriptor

    monkeypatch.setattr(os, "open", recorded)
    return names


def test_a_file_loses_its_own_name_only(tmp_path: Path) -> None:
    """Not the link that led to it, and not the file that has its name by now."""
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_bytes(b"x")
    link.symlink_to(real)
    with contextlib.closing(LocalFile.open(str(link))) as file:
        file.unlink()
        assert os.listdir(tmp_path) == ["link"]
    real.write_bytes(b"x")
    with contextlib.closing(LocalFile.open(str(link))) as file:
        real.rename(tmp_path / "moved")
        real.write_bytes(b"another's")
        file.unlink()
        assert sorted(os.listdir(tmp_path)) == ["link", "real"]
        with pytest.raises(OSError, match="No such file"):
            file.unlink()
