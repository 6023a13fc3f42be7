"""The files for desktops: a file manager knows the images by their bytes, and has the handler for each type."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, Ran

_TYPES = REPOSITORY / "packaging/tapfs.xml"
_HANDLER = REPOSITORY / "packaging/tapfs-mount-files.desktop"
_PREFIX = "application/x-"

#: What is made, and its type.
_MADE = {
    "qcow": "qemu-disk",
    "qcow2": "qemu-disk",
    "vmdk": "virtualbox-vmdk",
    "vhd": "virtualbox-vhd",
    "vhdx": "virtualbox-vhdx",
    "vdi": "virtualbox-vdi",
}
_BYTES = {
    "descriptor": (b"# Disk DescriptorFile\nversion=1\n", "virtualbox-vmdk"),
    "cowd": (b"COWD\x01\0\0\0", "virtualbox-vmdk"),
    "qed": (b"QED\0\0\0\1\0", "qed-disk"),
    "parallels": (b"WithoutFreeSpace\2\0\0\0", "parallels-disk"),
    "parallels2": (b"WithouFreSpacExt\2\0\0\0", "parallels-disk"),
    "evidence": (b"EVF\x09\x0d\x0a\xff\0\1\1\0\0\0", "ewf-image"),
}


@pytest.fixture
def types(tmp_path: Path) -> Path:
    """A folder for XDG_DATA_DIRS that knows ours and the types of the system."""
    packages = tmp_path / "share/mime/packages"
    packages.mkdir(parents=True)
    shutil.copy("/usr/share/mime/packages/freedesktop.org.xml", packages)
    shutil.copy(_TYPES, packages)
    done = subprocess.run(["update-mime-database", packages.parent], env={}, capture_output=True, text=True, check=True)
    assert "tapfs.xml" not in done.stderr
    return tmp_path / "share"


def test_images_are_known_by_their_bytes(types: Path, tmp_path: Path, tapfs: Callable[..., Ran]) -> None:
    files = {}
    for name, wanted in _MADE.items():
        files[tmp_path / name] = wanted
        assert tapfs("create", "-f", name, tmp_path / name, "32M").code == 0
    for name, (head, wanted) in _BYTES.items():
        files[tmp_path / name] = wanted
        (tmp_path / name).write_bytes(head.ljust(65536, b"\0"))
    for path, wanted in files.items():
        done = subprocess.run(
            ["gio", "info", "-a", "standard::content-type", path],
            env={"XDG_DATA_DIRS": str(types), "PATH": "/usr/bin", "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert f"standard::content-type: {_PREFIX}{wanted}\n" in done.stdout, path


def test_the_handler_is_one_for_every_type() -> None:
    done = subprocess.run(["desktop-file-validate", _HANDLER], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    taken = re.search(r"^MimeType=(.*);$", _HANDLER.read_text(), re.MULTILINE)
    assert taken is not None
    assert set(re.findall(r'mime-type type="(.*)"', _TYPES.read_text())) <= set(taken[1].split(";"))
