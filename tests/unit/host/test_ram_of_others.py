"""RAM disks lie where everybody may make files: what another has put there is never taken for ours."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import tapfs
from tapfs import ErrorKind, ImageError, NewImage
from tapfs.host import ram
from tests.unit.host.other_user import as_other_user

MIB = 1 << 20


@pytest.fixture
def host_file(ram_name: str, sticky: Path) -> Path:
    """Where the RAM disk's file is."""
    return Path(ram.host_path(ram_name))


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
    assert private.read_bytes() == b"p" * 4096
    assert ram_name.removeprefix("ram:") not in {disk.name for disk in ram.ram_disks()}
    ram.remove(ram_name)
    assert not host_file.is_symlink()
    assert private.exists()


def test_root_s_may_be_opened_by_others(ram_name: str, host_file: Path) -> None:
    tapfs.create_image(ram_name, NewImage("ram", MIB))
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
