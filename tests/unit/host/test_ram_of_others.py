"""RAM disks lie where everybody may make files: what another has put there is never taken for ours."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tapfs
from tapfs import ErrorKind, ImageError
from tapfs.host import ram
from tests.unit.host.other_user import OTHER_USER, as_other_user

MIB = 1 << 20


@pytest.fixture
def host_file(ram_name: str, sticky: Path) -> Path:
    """Where the RAM disk's file is."""
    return Path(ram.host_path(ram_name))


def test_a_new_one_is_its_owner_s_alone(ram_name: str, sample: Path, tapfs: Callable[..., Any]) -> None:
    before = os.umask(0o022)
    try:
        assert tapfs("create", "-f", "ram", ram_name, "1M").code == 0
        assert stat.S_IMODE(os.stat(ram.host_path(ram_name)).st_mode) == 0o600
        assert tapfs("convert", "-f", "raw", "-O", "ram", sample, ram_name).code == 0
        assert stat.S_IMODE(os.stat(ram.host_path(ram_name)).st_mode) == 0o600
    finally:
        os.umask(before)


def test_another_s_empty_file_is_not_adopted(ram_name: str, host_file: Path, sample: Path) -> None:
    as_other_user('umask 0; : > "$1"', host_file)
    for make in (
        lambda: tapfs.create(ram_name, "ram", MIB),
        lambda: tapfs.create(ram_name, "ram", MIB, overwrite=True),
    ):
        with pytest.raises(ImageError) as raised:
            make()
        assert raised.value.kind is ErrorKind.DENIED
        assert f"belongs to user {OTHER_USER}" in str(raised.value)
    assert host_file.stat().st_size == 0


def test_another_s_disk_is_not_opened_by_its_name(ram_name: str, host_file: Path) -> None:
    as_other_user('umask 0; head -c 4096 /dev/zero > "$1"', host_file)
    for writable in (False, True):
        with pytest.raises(ImageError) as raised:
            tapfs.open(ram_name, writable=writable)
        assert raised.value.kind is ErrorKind.DENIED
        assert f"open {host_file} and say format='raw'" in str(raised.value)
    tapfs.open(host_file, format="raw", writable=True).close()


def test_a_link_is_not_followed(ram_name: str, host_file: Path, tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.write_bytes(b"p" * 4096)
    private.chmod(0o600)
    as_other_user('ln -s "$2" "$1"', host_file, private)
    for writable in (False, True):
        with pytest.raises(ImageError) as raised:
            tapfs.open(ram_name, writable=writable)
        assert raised.value.kind is ErrorKind.DENIED
    with pytest.raises(ImageError) as raised:
        tapfs.create(ram_name, "ram", MIB, overwrite=True)
    assert raised.value.kind is ErrorKind.DENIED
    assert private.read_bytes() == b"p" * 4096
    assert ram_name.removeprefix("ram:") not in {disk.name for disk in ram.ram_disks()}
    ram.remove(ram_name)
    assert not host_file.is_symlink()
    host_file.symlink_to(private)  # not even one of ours: a RAM disk is where its name says
    for use in (
        lambda: tapfs.open(ram_name, writable=True),
        lambda: tapfs.create(ram_name, "ram", MIB, overwrite=True),
    ):
        with pytest.raises(ImageError, match="is a symbolic link"):
            use()
    assert private.read_bytes() == b"p" * 4096


def test_root_s_may_be_opened_by_others(ram_name: str, host_file: Path) -> None:
    tapfs.create(ram_name, "ram", MIB)
    host_file.chmod(0o644)
    ram.judge(os.stat(host_file), ram_name)
    mine = os.stat_result((0o100644, 1, 1, 1, 0, 0, MIB, 0, 0, 0))
    ram.judge(mine, ram_name)


def test_names_of_no_ram_disk_are_not_listed(ram_name: str, host_file: Path) -> None:
    forged = host_file.with_name(f"{host_file.name}\x1b[31m\nforged")
    as_other_user(': > "$1"', forged)
    try:
        assert all(disk.name.isprintable() for disk in ram.ram_disks())
    finally:
        forged.unlink()
