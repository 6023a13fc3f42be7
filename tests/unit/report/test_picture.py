"""The picture of a disk: exact, or in bins of a bounded size; damage costs its own cluster; garbage has an end."""

from __future__ import annotations

import struct
from base64 import b64decode
from pathlib import Path

import tapfs
from tapfs.report.packing import packed_grid, packed_picture
from tapfs.report.picture import COLUMNS, DAMAGED, EMPTY, LAYERS, ZEROS, Picture, picture_of
from tests.scattered_qcow2 import scattered_qcow2, stepped
from tests.unit.report.reported_images import MIB, overlay_with_faults


def number(packed: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (packed[at] & 127) << shift
        at += 1
        if packed[at - 1] < 128:
            return value, at
        shift += 7


def test_an_overlay(tmp_path: Path) -> None:
    path = overlay_with_faults(tmp_path / "overlay.qcow2", tmp_path / "base.raw")
    with tapfs.open(path) as image:
        place = next(extent.host_offset for extent in image.extents(40 * MIB) if extent.data)
        picture = picture_of(image, [place, 1 << 40], most_runs=100)
        assert picture.runs is not None
        assert [(run.offset, run.length) for run in picture.runs] == [(e.offset, e.length) for e in image.extents()]
    assert picture.totals[0] == 4 * MIB
    assert picture.totals[1] == 4 * MIB
    assert picture.totals[ZEROS] == 64 * MIB - 8 * MIB
    assert picture.data_bytes == 8 * MIB
    assert picture.packed_bytes == 0
    assert picture.places[1] is None
    assert picture.places[0] in (40 * MIB, (40 * MIB) + (5 << 16))
    assert sum(picture.fragments) == 5


def test_a_huge_fragmented_disk_takes_bounded_text(tmp_path: Path) -> None:
    """1 TiB, clusters in any order: the text is cut to the bound, and says how fine it is."""
    path = tmp_path / "image.qcow2"
    scattered_qcow2(path, 1 << 40, stepped(1 << 13, 1 << 24))
    with tapfs.open(path) as image:
        picture = picture_of(image, most_runs=1000)
    assert picture.runs is None
    assert picture.totals[0] == 1 << 29
    assert picture.totals[EMPTY] == (1 << 40) - (1 << 29)
    assert len(picture.bins) <= 16384
    packed = packed_picture(picture, 800)
    assert packed.runs is None
    assert packed.bins is not None
    assert len(packed.bins) <= 800
    assert len(packed.grid) < 20000
    assert packed.width > picture.width
    text, at, bins = b64decode(packed.bins), 0, 0
    while at < len(text):
        count, at = number(text, at)
        mask, at = number(text, at)
        assert mask == (1 | 1 << EMPTY)
        at += 1
        bins += count + 1
    assert bins == (1 << 40) // packed.width


def test_entries_that_cannot_be_true_cost_their_own_cluster(tmp_path: Path) -> None:
    path = overlay_with_faults(tmp_path / "overlay.qcow2", tmp_path / "base.raw")
    with path.open("r+b") as file:
        (l1,) = struct.unpack_from(">Q", file.read(48), 40)
        file.seek(l1)
        l2 = struct.unpack(">Q", file.read(8))[0] & 0x00FFFFFFFFFFFE00
        for entry in (3, 5):
            file.seek(l2 + 8 * entry)
            file.write(struct.pack(">Q", 1 << 63 | 0x10200))
    with tapfs.open(path) as image:
        picture = picture_of(image, most_runs=100)
    assert picture.totals[DAMAGED] == 2 << 16
    assert picture.totals[0] == 4 * MIB - (2 << 16)
    assert sum(picture.totals) == 64 * MIB


def test_a_disk_of_nothing_but_faults_has_an_end(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    scattered_qcow2(path, 1 << 30, range(1 << 14))
    with path.open("r+b") as file:
        (l1,) = struct.unpack_from(">Q", file.read(48), 40)
        file.seek(l1)
        l2 = [place & 0x00FFFFFFFFFFFE00 for place in struct.unpack(">2Q", file.read(16))]
        for place in l2:
            file.seek(place)
            file.write(struct.pack(">Q", 1 << 63 | 0x10200) * 8192)
    with tapfs.open(path) as image:
        picture = picture_of(image, most_runs=100)
    assert picture.totals[DAMAGED] == 1 << 30
    assert picture.counts[DAMAGED] < 100


def test_an_empty_disk_and_levels_of_the_plot(tmp_path: Path) -> None:
    path = tmp_path / "empty.raw"
    path.touch()
    with tapfs.open(str(path), format="raw") as image:
        picture = picture_of(image, most_runs=10)
    assert picture.totals == [0] * COLUMNS
    assert packed_picture(picture, 1000).runs == ""
    levels: list[int] = []
    packed, at = packed_grid([0, 0, 1, 1 << 40, 1 << 40, 1 << 39]), 0
    while at < len(packed):
        value, at = number(packed, at)
        levels += [value % 16] * (value // 16 + 1)
    assert levels == [0, 0, 1, 15, 15, 14]


def test_layers_below_the_fifth_share_a_column(tmp_path: Path) -> None:
    names = [str(tmp_path / f"{depth}.qcow2") for depth in range(LAYERS + 2)]
    for depth, name in enumerate(names):
        below = names[depth - 1] if depth else None
        tapfs.create(name, "qcow2", MIB, backing=below, backing_format=below and "qcow2")
        with tapfs.open(name, writable=True, write_base=True) as disk:
            disk.write(depth << 16, b"x")
    with tapfs.open(names[-1]) as image:
        picture: Picture = picture_of(image)
    assert picture.totals[: LAYERS + 1] == [1 << 16] * (LAYERS - 1) + [3 << 16, 0]
