"""DMG images read by 7-Zip and qemu-img as tapfs reads them. docs/specs/dmg.md says which reader errs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import tapfs
from tests.dmg_images import ADC, BZIP2, LZMA, RAW, ZLIB, image
from tests.unit.formats.dmg.test_dmg import parts, written

KINDS = {"raw": RAW, "adc": ADC, "zlib": ZLIB, "bzip2": BZIP2, "lzma": LZMA}


@pytest.mark.parametrize("name", KINDS)
def test_seven_zip_reads_the_same(tmp_path: Path, name: str) -> None:
    made, disk = parts(KINDS[name])
    path = written(tmp_path, image(made))
    # A file for each partition, in their order; together they are the disk.
    read = subprocess.run(["7zz", "e", "-so", "-tdmg", path], check=True, capture_output=True, timeout=60).stdout
    assert read == disk
    with tapfs.open(path) as opened:
        assert opened.read(0, opened.size) == read


@pytest.mark.parametrize("name", ["raw", "zlib"])
def test_qemu_img_reads_the_same(tmp_path: Path, name: str) -> None:
    made, disk = parts(KINDS[name])
    path = written(tmp_path, image(made))
    raw = tmp_path / "disk.raw"
    raw.write_bytes(disk)
    subprocess.run(["qemu-img", "compare", "-f", "dmg", "-F", "raw", path, raw], check=True, timeout=60)
