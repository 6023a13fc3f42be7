"""Sidecars and damaged files from Python."""

from __future__ import annotations

from pathlib import Path

import pytest

import tapfs


def test_a_disk_is_hashed_and_verified(tmp_path: Path, sample: Path) -> None:
    image = tmp_path / "disk.qcow2"
    tapfs.convert(sample, image, format="raw", target_format="qcow2")
    hashed = tapfs.write_sidecar(image, leaf_bytes=4096)
    assert tapfs.verify(image, root=hashed.root).verdict is tapfs.Verdict.SAME
    assert tapfs.verify(sample, f"{image}.tapfs-hash", format="raw").verdict is tapfs.Verdict.SAME
    with tapfs.open(image, writable=True) as disk:
        disk.write(8192, b"other")
        found = tapfs.verify(disk)
    assert (found.verdict, found.differing) == (tapfs.Verdict.CHANGED, [(8192, 4096)])
    with pytest.raises(tapfs.ImageError, match="another disk"):
        tapfs.verify(image, root=bytes(32))


def test_ranges_in_no_file_system_are_in_no_file(sample: Path) -> None:
    (part,) = tapfs.damaged_files(sample, [(0, 512)], format="raw")
    assert (part.partition, part.type, part.found.unowned) == (None, None, [(0, 512)])
