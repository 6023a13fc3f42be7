"""`tapfs measure` of qcow2 beside `qemu-img measure`: the same numbers, or fewer bytes where QEMU rounds up."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path

import pytest

import tapfs

OPTIONS = ("cluster_size=65536", "extended_l2=on", "refcount_bits=1")


def of_qemu(*words: str) -> dict[str, int]:
    command = ["qemu-img", "measure", "--output", "json", "-O", "qcow2", *words]
    found: dict[str, int] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return found


@pytest.mark.usefixtures("each_qemu")
def test_qemu_measures_the_same_disk_the_same(tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    with disk.open("wb") as file:
        for at in (0, 1 << 20, (5 << 20) - 4096):
            file.seek(at)
            file.write(random.Random(3).randbytes(4096))
        file.truncate((5 << 20) + 512)
    for option in OPTIONS:
        name, _, value = option.partition("=")
        found = tapfs.measure(disk, target_format="qcow2", options={name: value}, format="raw")
        told = of_qemu("-o", option, "-f", "raw", str(disk))
        assert (found.required, found.fully_allocated) == (told["required"], told["fully-allocated"]), option


@pytest.mark.usefixtures("each_qemu")
def test_qemu_counts_the_tables_of_a_whole_empty_disk() -> None:
    for option in OPTIONS:
        name, _, value = option.partition("=")
        found = tapfs.measure(None, target_format="qcow2", size=300 << 20, options={name: value})
        told = of_qemu("-o", option, "--size", str(300 << 20))
        assert found.fully_allocated == told["fully-allocated"], option
        assert found.required < told["required"], option
