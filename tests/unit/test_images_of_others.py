"""Images that Windows, macOS, Parallels Desktop and libewf wrote (fixtures/dfvfs) are read as their manifest says."""

from __future__ import annotations

import hashlib
import tomllib
from pathlib import Path
from typing import Any

import pytest

import tapfs
from tapfs.driver import Severity
from tests import filled_file_systems as filled
from tests.conftest import REPOSITORY, unpack

FOLDER = REPOSITORY / "fixtures/dfvfs"
IMAGES: list[dict[str, Any]] = tomllib.loads((FOLDER / "MANIFEST.toml").read_text(encoding="utf-8"))["image"]


@pytest.mark.parametrize("entry", IMAGES, ids=lambda entry: Path(entry["file"]).stem)
def test_the_disk_is_read_as_it_was_written(entry: dict[str, Any], tmp_path: Path) -> None:
    """Its format is known, its parents are found by what it says of them, and a check finds nothing."""
    path = unpack(FOLDER / entry["file"], tmp_path)
    for name in [entry["backing"]] if "backing" in entry else entry.get("others", []):
        unpack(FOLDER / name, tmp_path)
    with tapfs.open(path) as disk:
        assert disk.format_name == entry["format"]
        digest = hashlib.sha256()
        for offset in range(0, disk.size, 1 << 20):
            digest.update(disk.read(offset, min(1 << 20, disk.size - offset)))
    assert digest.hexdigest() == entry["guest_sha256"]
    report = tapfs.check(path)
    assert [finding.message for finding in report.findings if finding.severity is not Severity.NOTE] == []


@pytest.mark.parametrize("name", [entry["file"] for entry in IMAGES if "backing" in entry])
def test_without_its_parent_no_disk_is_shown(name: str, tmp_path: Path) -> None:
    path = unpack(FOLDER / name, tmp_path)
    with pytest.raises(tapfs.ImageError, match="parent") as caught:
        tapfs.open(path).close()
    assert caught.value.kind is tapfs.ErrorKind.NOT_FOUND


def test_an_image_that_is_not_read_is_named(tmp_path: Path) -> None:
    path = unpack(FOLDER / "hfsplus.sparseimage.xz", tmp_path)
    with pytest.raises(tapfs.ImageError, match="Apple sparse image"):
        tapfs.open(path).close()


def test_the_free_clusters_of_a_volume_of_windows_are_found(tmp_path: Path) -> None:
    """Windows 10 sets flag 0x80 of clean volumes, and has files that are not in their records and have no clusters."""
    path = unpack(FOLDER / "ntfs-dynamic.vhd.xz", tmp_path)
    with tapfs.open_file(path, partition=1) as part:
        (tmp_path / "volume").write_bytes(part.read())
    (found,) = tapfs.compact(path, dry_run=True, zeros=False).file_systems
    free = filled.free_by_ntfscat(tmp_path / "volume")
    assert (found.left_alone, found.free) == (None, sum(run.length for run in free))
