"""Mounts that prove their reads, as users make them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

import tapfs
from tests.fuse.conftest import Mounts


@pytest.mark.parametrize("mounts", ["pyfuse3"], indirect=True)
def test_a_spoiled_leaf_cannot_be_read_and_the_others_can(mounts: Mounts, sample: Path, tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    tapfs.convert(sample, image, format="raw", target_format="qcow2")
    assert mounts.run("hash", "-q", image).code == 0
    content = sample.read_bytes()
    words = ("mount", "--engine", "auto", "--verify-reads", image)
    directory = mounts.directory()
    assert mounts.run(*words, directory).code == 0
    assert (directory / "disk").read_bytes() == content
    assert "reads verified" in mounts.run("list").out
    assert mounts.run("umount", directory).code == 0

    with tapfs.open(image) as disk:
        extent = next(each for each in disk.extents(1 << 20) if each.host_offset is not None)
    with image.open("r+b") as file:
        file.seek(extent.host_offset)
        file.write(b"spoiled")
    ran = mounts.run(*words, directory)
    assert ran.code == 0
    assert "were written since" in ran.err
    with (directory / "disk").open("rb", buffering=0) as file:
        assert os.pread(file.fileno(), 4096, 0) == content[:4096]
        with pytest.raises(OSError, match=os.strerror(errno.EIO)) as caught:
            os.pread(file.fileno(), 4096, extent.offset)
        assert caught.value.errno == errno.EIO
    assert mounts.run("umount", directory).code == 0


@pytest.mark.parametrize("mounts", ["pyfuse3"], indirect=True)
def test_what_cannot_be_proved_is_not_mounted(mounts: Mounts, sample: Path, tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(sample.read_bytes())
    directory = mounts.directory()
    for options, code in (
        (("--verify-reads",), 17),
        (("--verify-reads", "--rw"), 64),
        (("--verify-reads", "--temp"), 64),
        (("--verify-reads", "--engine", "native"), 64),
        (("--sidecar", "x"), 64),
        (("--verify-reads", "--sidecar", image), 11),
    ):
        assert mounts.run("mount", "-f", "raw", *options, image, directory).code == code, options
