"""The holes of a raw file: a search for one may pass over all of the file, so none is made twice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import tapfs
from tapfs.jobs.create import NewImage, new_image

MIB = 1 << 20


def test_a_copy_searches_a_file_without_holes_once(tmp_path: Path) -> None:
    """On tmpfs each search looks at every page up to the end of the file: a GiB cost 4 s."""
    source, target, log = tmp_path / "a.raw", tmp_path / "b.raw", tmp_path / "log"
    source.write_bytes(b"x" * 24 * MIB)
    convert = [Path(sys.executable).with_name("tapfs"), "convert", "-f", "raw", "-O", "raw", source, target]
    subprocess.run(["strace", "-f", "-qq", "-e", "trace=lseek", "-o", log, *convert], check=True)
    assert log.read_text().count("SEEK_HOLE") == 1
    assert target.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("image_format", ["raw", "vhd"])
def test_the_host_is_asked_twice_for_each_piece(tmp_path: Path, image_format: str) -> None:
    """For the end of the hole before a piece, and for the end of the piece itself."""
    source, target, log = tmp_path / "source", tmp_path / "target", tmp_path / "log"
    places = range(0, 16 * MIB, 64 << 10)
    with new_image(str(source), NewImage(format=image_format, size=16 * MIB)) as disk:
        for place in places:
            disk.write(place, b"x" * 4096)
    convert = [Path(sys.executable).with_name("tapfs"), "convert", "-f", image_format, "-O", "qcow2", source, target]
    subprocess.run(["strace", "-f", "-qq", "-e", "trace=lseek", "-o", log, *convert], check=True)
    asked = log.read_text().count("SEEK_HOLE") + log.read_text().count("SEEK_DATA")
    assert asked <= 2 * len(places) + 32
    with tapfs.open(source, format=image_format) as disk, tapfs.open(target) as copy:
        assert copy.read(0, disk.size) == disk.read(0, disk.size)


@pytest.mark.parametrize("place", [0, 5 * MIB, 7 * MIB])
def test_a_hole_that_is_made_later_is_found(tmp_path: Path, place: int) -> None:
    path = tmp_path / "a.raw"
    path.write_bytes(b"x" * 8 * MIB)

    def holes(disk: tapfs.Image) -> list[tuple[int, int]]:
        return [(run.offset, run.length) for run in disk.extents() if run.zero]

    with tapfs.open(path, format="raw", writable=True) as disk:
        assert holes(disk) == []
        disk.discard(place, MIB)
        assert holes(disk) == [(place, MIB)]
        disk.write(place, b"y" * MIB)
        assert holes(disk) == []
