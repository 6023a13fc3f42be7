"""Files of every format that were cut inside the disk's data are corrupt, wherever they are looked at.

A salvage takes what is left of a block that was cut. QEMU fills each cluster that it allocates, and reads zeros after a
cut. So a file that ends before the disk's part of a cluster was cut.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

import tapfs
from tapfs import ErrorKind, ImageError
from tests.peer.newest_qemu import newest_qemu
from tests.peer.test_convert import qemu

MIB = 1 << 20
#: No multiple of a cluster, so the disk ends inside its last one.
SIZE = 5 * MIB + 1000 * 512

#: qemu-img's name of the format, and options.
FORMATS = {
    "qcow2": ("qcow2", "cluster_size=64K"),
    "qcow2-subclusters": ("qcow2", "extended_l2=on,cluster_size=32K"),
    "qcow2-old": ("qcow2", "compat=0.10"),
    "vmdk": ("vmdk", "subformat=monolithicSparse"),
    "qed": ("qed", "cluster_size=64K"),
    "parallels": ("parallels", "cluster_size=1M"),
    "vdi": ("vdi", None),
    "vhdx": ("vhdx", "block_size=1M"),
}
#: What one entry of their tables stands for.
CLUSTERS = dict.fromkeys(("parallels", "vdi", "vhdx"), 1 << 20) | {
    "qcow2": 1 << 16,
    "qcow2-subclusters": 1 << 15,
    "qcow2-old": 1 << 16,
    "vmdk": 1 << 16,
    "qed": 1 << 16,
}


@pytest.mark.parametrize("version", ["the system's", "the newest"])
@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_a_file_that_was_cut_is_corrupt(tmp_path: Path, kind: str, version: str) -> None:
    source, image = tmp_path / "source", tmp_path / "image"
    source.write_bytes(random.Random(kind).randbytes(SIZE))
    name, options = FORMATS[kind]
    program = "qemu-img" if version == "the system's" else newest_qemu("qemu-img")
    words = [] if options is None else ["-o", options]
    qemu(program, "convert", "-f", "raw", "-O", name, *words, source, image)
    assert tapfs.check(image).findings == []
    with tapfs.open(image) as disk:
        places = [(extent.host_offset + extent.length, extent) for extent in disk.extents() if extent.host_offset]
        end, last = max(places)
        assert last.end == disk.size, "the end of the disk is not at the end of the file"
        assert disk.read(0, SIZE) == source.read_bytes()

    os.truncate(image, end)
    assert tapfs.check(image).corruptions == 0
    assert tapfs.compare(image, source) is None

    os.truncate(image, end - 1)
    report = tapfs.check(image)
    assert report.corruptions == 1, report.findings
    assert report.leaks == 0
    with tapfs.open(image) as disk, pytest.raises(ImageError) as raised:
        disk.read(last.end - 512, 512)
    assert raised.value.kind is ErrorKind.CORRUPT
    assert report.findings[0].message == raised.value.message

    os.truncate(image, end - 3 * CLUSTERS[kind])
    report = tapfs.check(image)
    named = {finding.message.partition(": ")[0] for finding in report.findings}
    assert len(named) == report.corruptions == 4, report.findings  # what the disk's end leaves of the last, and three


#: Further kinds whose files a salvage reads up to their ends.
SALVAGED = FORMATS | {
    "qcow": ("qcow", None),
    "vpc": ("vpc", None),
    "vmdk-flat": ("vmdk", "subformat=monolithicFlat"),
    "vhdx-large": ("vhdx", "block_size=32M"),
}


@pytest.mark.parametrize("kind", sorted(SALVAGED))
def test_a_salvage_takes_what_is_left_of_a_block(tmp_path: Path, kind: str) -> None:
    source, image, rescued = tmp_path / "source", tmp_path / "image.vmdk", tmp_path / "rescued"
    content = random.Random(kind).randbytes(SIZE)
    source.write_bytes(content)
    name, options = SALVAGED[kind]
    words = [] if options is None else ["-o", options]
    qemu("qemu-img", "convert", "-f", "raw", "-O", name, *words, source, image)
    with tapfs.open(image) as disk:
        size, extents = disk.size, [extent for extent in disk.extents() if extent.host_offset is not None]
    end = max(extent.host_offset + extent.length for extent in extents if extent.host_offset is not None)
    cut = end - 2 * MIB - 300 * 512 - 100  # inside of a sector of a cluster, and before others
    os.truncate(tmp_path / "image-flat.vmdk" if kind == "vmdk-flat" else image, cut)
    expected = bytearray(size)
    for extent in extents:
        there = max(0, min(extent.length, (cut - (extent.host_offset or 0)) // 512 * 512))
        expected[extent.offset : extent.offset + there] = content[extent.offset : extent.offset + there]
    lost = tapfs.convert(image, rescued, target_format="raw", salvage=True)
    assert rescued.read_bytes() == expected
    assert lost
    assert sum(each.length for each in lost) == size - len(expected.rstrip(b"\0")) // 512 * 512
    assert all(not any(expected[each.offset : each.end]) for each in lost)
    with pytest.raises(ImageError) as raised:  # without a salvage nothing of a damaged block is taken
        tapfs.convert(image, tmp_path / "refused", target_format="raw")
    assert raised.value.kind is ErrorKind.CORRUPT
