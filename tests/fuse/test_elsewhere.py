"""A disk on an NBD server is mounted to be written: in the sandbox, and without a server that follows a killed one."""

from __future__ import annotations

import os
from pathlib import Path

from tests.fuse.conftest import Mounts
from tests.unit.remote.cut_line import nbd_served

MIB = 1 << 20


def test_what_is_written_has_got_there(mounts: Mounts, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.write_bytes(bytes(4 * MIB))
    with nbd_served(there) as socket:
        directory = mounts.directory()
        ran = mounts.run("mount", "-f", "raw", "--rw", f"nbd+unix:///disk?socket={socket}", directory)
        assert (ran.code, ran.err) == (0, "")
        disk = os.open(directory / "disk", os.O_RDWR)
        os.pwrite(disk, b"written" * 1000, 3 * MIB)
        os.fsync(disk)
        os.close(disk)
        assert there.read_bytes()[3 * MIB :][:7000] == b"written" * 1000
        mounts.umount(directory)
