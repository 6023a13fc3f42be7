"""Each program of examples/ runs, on images as its first lines say."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import tapfs
from tests.conftest import REPOSITORY

MIB = 1 << 20
EXAMPLES = sorted(path.name for path in (REPOSITORY / "examples").glob("*.py"))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A qcow2 with a partition, a snapshot and an overlay."""
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(2 * MIB))
    subprocess.run(["sfdisk", "-q", disk], input=b"2048,\n", check=True)
    path = tmp_path / "disk.qcow2"
    tapfs.convert(disk, path, format="raw", target_format="qcow2")
    with tapfs.open(path, writable=True) as opened:
        opened.write(MIB, b"partition")
    tapfs.create_snapshot(path, "one")
    tapfs.create(tmp_path / "over.qcow2", "qcow2", 2 * MIB, backing="disk.qcow2", backing_format="qcow2")
    with zipfile.ZipFile(tmp_path / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(path, "disk.qcow2")
    return path


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_example_does_what_it_says(name: str, image: Path) -> None:
    folder = image.parent
    words, expected = {
        "partitions.py": ([image], ["qcow2, 2097152 bytes", "1: 1048576 bytes", "70 61 72 74"]),
        "image_in_a_zip.py": ([folder / "images.zip", "disk.qcow2", folder / "new.qcow2"], ["qcow2, 2097152 bytes"]),
        "by_fsspec.py": ([image], ["2097152 disk", "1048576 part1  70 61 72 74", "snapshots/one"]),
        "convert_with_progress.py": ([image, folder / "new.qcow2"], ["bytes on the host"]),
        "unused_images.py": ([folder], ["over.qcow2 (over 1)"]),
    }[name]
    command = [sys.executable, REPOSITORY / "examples" / name]
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for each in expected:
        assert each in done.stdout
    if (folder / "new.qcow2").exists():
        assert tapfs.compare(image, folder / "new.qcow2") is None
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert told.returncode == 1
    assert f"usage: {name}" in told.stderr


def test_the_list_of_examples_is_whole() -> None:
    text = (REPOSITORY / "examples/README.md").read_text()
    assert [name for name in EXAMPLES if f"[{name}]({name})" not in text] == []
