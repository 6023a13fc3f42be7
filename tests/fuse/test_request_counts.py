"""Requests to a mount are counted, whoever serves it: `tapfs stats` tells of those that pyfuse3 answers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.fuse.conftest import Mounts


@pytest.mark.parametrize("mounts", ["pyfuse3"], indirect=True)
def test_requests_that_pyfuse3_serves_are_counted(mounts: Mounts, tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    assert mounts.run("create", "-f", "qcow2", image, "1M").code == 0
    directory = mounts.mount(image, "--rw")
    with (directory / "disk").open("r+b", buffering=0) as disk:
        os.pwrite(disk.fileno(), b"x" * 4096, 0)
        os.fsync(disk.fileno())
    (directory / "info.json").read_text()
    (told,) = json.loads(mounts.run("stats", "--json").out)
    asked = told["operations"]["operations"]
    assert (asked["write"]["requests"], asked["write"]["bytes"], asked["write"]["errors"]) == (1, 4096, 0)
    assert asked["flush"]["requests"] >= 1
    assert sum(asked["write"]["buckets"]) == 1
    assert asked["read"]["bytes"] % 4096 == 0  # of info.json nothing is
    mounts.umount(directory)
