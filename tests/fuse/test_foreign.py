"""Images of formats that tapfs does not read: on a block device, and mounted as what they are."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.fuse.conftest import Mounts


@pytest.fixture
def encrypted(tmp_path: Path) -> Path:
    """A file of 1 MiB with the last bytes of an encrypted Apple disk image."""
    path = tmp_path / "disk.dmg"
    path.write_bytes(bytes((1 << 20) - 8) + b"cdsaencr")
    return path


def test_it_is_mounted_where_it_is_said_to_be_raw(mounts: Mounts, encrypted: Path) -> None:
    directory = mounts.mount(encrypted, "-f", "raw")
    assert (directory / "disk").stat().st_size == encrypted.stat().st_size
    assert (directory / "disk").read_bytes()[-8:] == b"cdsaencr"
    mounts.umount(directory)


@pytest.mark.usefixtures("root", "no_new_loop_device")
def test_it_is_known_on_a_block_device(mounts: Mounts, encrypted: Path) -> None:
    words = ["losetup", "--find", "--show", "--read-only", encrypted]
    loop = subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()
    try:
        code, out, err = mounts.run("info", loop)
        assert (code, out) == (12, "")
        assert f"{loop}: is an encrypted Apple disk image (DMG), which tapfs does not read" in err
        assert mounts.run("info", "-f", "raw", loop).code == 0
    finally:
        subprocess.run(["losetup", "--detach", loop], check=True)
