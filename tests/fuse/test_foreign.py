"""Images of formats that tapfs does not read: on a block device, and mounted as what they are."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.fuse.conftest import Mounts


@pytest.fixture
def vhd(tmp_path: Path) -> Path:
    """A fixed VHD: a disk of 1 MiB and a footer."""
    path = tmp_path / "disk.vhd"
    words = ["qemu-img", "create", "-q", "-f", "vpc", "-o", "subformat=fixed,force_size=on", path, "1M"]
    subprocess.run(words, check=True)
    return path


def test_it_is_mounted_where_it_is_said_to_be_raw(mounts: Mounts, vhd: Path) -> None:
    directory = mounts.mount(vhd, "-f", "raw")
    assert (directory / "disk").stat().st_size == vhd.stat().st_size
    assert (directory / "disk").read_bytes()[-512:-504] == b"conectix"
    mounts.umount(directory)


@pytest.mark.usefixtures("root", "no_new_loop_device")
def test_it_is_known_on_a_block_device(mounts: Mounts, vhd: Path) -> None:
    words = ["losetup", "--find", "--show", "--read-only", vhd]
    loop = subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()
    try:
        code, out, err = mounts.run("info", loop)
        assert (code, out) == (12, "")
        assert f"{loop}: is a VHD image, which tapfs does not read" in err
        assert mounts.run("info", "-f", "raw", loop).code == 0
    finally:
        subprocess.run(["losetup", "--detach", loop], check=True)
