"""Salvage of qcow2 images: what a scan finds of an image whose header, L1 table or file's end is lost."""

from __future__ import annotations

import random
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

import tapfs
from tapfs.disk.open_options import OpenOptions
from tapfs.disk.opening import open_image
from tapfs.driver import BackingReference
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Range
from tapfs.jobs.salvage import Salvaged, open_salvaged
from tapfs.jobs.sources import Salvaged as SalvagedSource
from tapfs.kernel.ranges import ranges_of
from tapfs.salvage import SalvageRequest

MIB = 1 << 20
#: More than one L2 table in each layout.
LAYOUTS = {
    "64k": {"cluster_size": "65536"},
    "4k": {"cluster_size": "4096"},
    "512": {"cluster_size": "512"},
    "subclusters": {"extended_l2": "on", "cluster_size": "16384"},
    "version 2": {"compat": "0.10", "cluster_size": "4096"},
}
SIZES = {"64k": 1100 * MIB, "4k": 40 * MIB, "512": 4 * MIB, "subclusters": 60 * MIB, "version 2": 40 * MIB}


def written(path: Path, options: dict[str, str], size: int, *, seed: int = 1) -> dict[int, bytes]:
    """A new image with data at random places, written in random order: the data by its places."""
    tapfs.create(path, "qcow2", size, options=options)
    chosen = random.Random(seed)
    data: dict[int, bytes] = {}
    with tapfs.open(path, writable=True) as image:
        for _ in range(60):
            place = chosen.randrange(size // 4096) * 4096
            data[place] = chosen.randbytes(4096)
            image.write(place, data[place])
        last = size - 4096
        data[last] = chosen.randbytes(4096)
        image.write(last, data[last])
    return data


def opened(path: Path, **known: object) -> Salvaged:
    return open_salvaged(str(path), OpenOptions(format="qcow2", salvage=SalvageRequest(**known)))  # type: ignore[arg-type]


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def l1_of(path: Path) -> tuple[int, int]:
    """The place of the L1 table and its bytes."""
    head = path.read_bytes()[:48]
    return int.from_bytes(head[40:48], "big"), 8 * int.from_bytes(head[36:40], "big")


@pytest.fixture(params=sorted(LAYOUTS))
def damaged(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[int, bytes], int]:
    path = tmp_path / "disk.qcow2"
    size = SIZES[request.param]
    return path, written(path, LAYOUTS[request.param], size), size


def test_a_lost_header_is_made_anew(damaged: tuple[Path, dict[int, bytes], int]) -> None:
    path, data, size = damaged
    overwrite(path, 0, bytes(512))
    with opened(path).image as image:
        assert image.size == size  # the last cluster has data
        assert all(image.read(place, 4096) == content for place, content in data.items())


def test_an_l1_table_that_the_header_does_not_lead_to_is_found(damaged: tuple[Path, dict[int, bytes], int]) -> None:
    path, data, _ = damaged
    overwrite(path, 40, (0).to_bytes(8, "big"))
    salvaged = opened(path)
    with salvaged.image as image:
        assert all(image.read(place, 4096) == content for place, content in data.items())
    assert "one was found at" in salvaged.found.rebuilt[0]
    assert not salvaged.found.doubts


def test_the_file_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    written(path, {}, 64 * MIB)
    overwrite(path, 0, bytes(104))
    before = path.read_bytes()
    with closing(opened(path).image) as image:
        image.read(0, MIB)
    assert path.read_bytes() == before


def test_a_sound_image_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    data = written(path, {}, 64 * MIB)
    salvaged = opened(path)
    with salvaged.image as image:
        assert all(image.read(place, 4096) == content for place, content in data.items())
    assert (salvaged.found.rebuilt, salvaged.found.doubts, salvaged.found.patch.stages) == ((), (), ())
    assert salvaged.found.unplaced == ()


def test_a_damaged_l1_entry_costs_its_part_of_the_disk_and_is_told(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    data = written(path, {"cluster_size": "4096"}, 40 * MIB)
    span = 2 * MIB
    broken = min(data) // span
    place, _ = l1_of(path)
    overwrite(path, place + 8 * broken, b"\x12\x34\x56\x78" * 2)
    salvaged = opened(path)
    with salvaged.image as image:
        source = SalvagedSource(image)
        for at, content in data.items():
            buffer = bytearray(4096)
            source.read_ranges(ranges_of([Range(at, 4096)], at + 4096), buffer)
            assert bytes(buffer) == (bytes(4096) if at // span == broken else content)
        assert source.lost
    assert any("L1 entries are damaged and have no copy" in text for text in salvaged.found.doubts)
    assert any("L2 tables are named by no L1 entry" in text for text in salvaged.found.doubts)
    # What the lost table maps is no table's any more.
    assert sum(each.length for each in salvaged.found.unplaced) >= 4096


def test_in_order_fills_a_damaged_entry_with_the_table_that_lies_there(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    tapfs.create(path, "qcow2", 20 * MIB, options={"cluster_size": "4096"})
    data = random.Random(2).randbytes(20 * MIB)
    with tapfs.open(path, writable=True) as image:
        image.write(0, data)
    place, _ = l1_of(path)
    overwrite(path, place + 8 * 4, b"\xff" * 8)
    salvaged = opened(path, in_order=True)
    with salvaged.image as image:
        assert image.read(0, image.size) == data
    assert any("are guessed" in text for text in salvaged.found.doubts)


def test_a_damaged_entry_is_taken_from_the_l1_table_that_grew(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    size = 64 * MIB
    data = written(path, {"cluster_size": "4096"}, size)
    old, length = l1_of(path)
    # A growth that moved the table: the same entries somewhere else, and the header leads there.
    raw = path.read_bytes()
    new = -(-len(raw) // 4096) * 4096
    overwrite(path, new, raw[old : old + length].ljust(4096, b"\0"))
    overwrite(path, 40, new.to_bytes(8, "big"))
    index = min(data) // (2 * MIB)
    overwrite(path, new + 8 * index, b"\xff" * 8)
    salvaged = opened(path)
    with salvaged.image as image:
        assert all(image.read(place, 4096) == content for place, content in data.items())
    assert salvaged.found.rebuilt == (f"L1 entry {index}, from an L1 table at {old:#x}",)


def test_an_image_without_its_header_and_its_end_loses_the_end_and_no_byte_is_made_up(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    tapfs.create(path, "qcow2", 16 * MIB)
    data = random.Random(3).randbytes(16 * MIB)
    with tapfs.open(path, writable=True) as image:
        image.write(0, data)
    overwrite(path, 0, bytes(512))
    whole = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(whole - 5 * MIB - 1000)
    with opened(path, virtual_size=16 * MIB).image as image:
        source = SalvagedSource(image)
        buffer = bytearray(16 * MIB)
        source.read_ranges(ranges_of([Range(0, 16 * MIB)], 16 * MIB), buffer)
        lost = [place for place, _ in source.lost]
    assert 5 * MIB <= sum(each.length for each in lost) <= 5 * MIB + 128 * 1024
    for place in lost:
        assert not any(buffer[place.offset : place.end])
    at = 0
    for place in lost:
        assert buffer[at : place.offset] == data[at : place.offset]
        at = place.end
    assert buffer[at:] == data[at:]


def test_the_parent_of_an_image_without_header_is_the_one_that_the_user_names(tmp_path: Path) -> None:
    base, path = tmp_path / "base.qcow2", tmp_path / "disk.qcow2"
    below = written(base, {}, 64 * MIB, seed=4)
    tapfs.create(path, "qcow2", backing=str(base), backing_format="qcow2")
    with tapfs.open(path, writable=True) as image:
        image.write(MIB, b"x" * 4096)
    overwrite(path, 0, bytes(512))
    options = OpenOptions(
        format="qcow2",
        backing=str(base),
        salvage=SalvageRequest(virtual_size=64 * MIB, backing=BackingReference(str(base), "qcow2")),
    )
    with open_salvaged(str(path), options).image as image:
        assert image.read(MIB, 4096) == b"x" * 4096
        clusters = {MIB // 65536}
        assert all(
            image.read(place, 4096) == content for place, content in below.items() if place // 65536 not in clusters
        )


@pytest.mark.parametrize("scheme", ["mbr", "gpt"])
def test_a_partition_table_says_the_size_that_a_lost_header_had(tmp_path: Path, scheme: str) -> None:
    raw, path = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    with raw.open("wb") as file:
        file.truncate(64 * MIB)
    script = {"mbr": "label: dos\nstart=2048, size=129024\n", "gpt": "label: gpt\nstart=2048, size=4096\n"}[scheme]
    subprocess.run(["/sbin/sfdisk", "-q", raw], input=script, text=True, check=True)
    if scheme == "gpt":  # the backup is the last data of the disk, so it would say the size by itself
        with raw.open("r+b") as file:
            file.seek(63 * MIB)
            file.write(bytes(MIB))
    tapfs.convert(raw, path, target_format="qcow2", format="raw")
    overwrite(path, 0, bytes(512))
    salvaged = opened(path)
    with salvaged.image as image:
        assert image.size == 64 * MIB
    assert any("its partition table says so" in text for text in salvaged.found.doubts)


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(random.Random(5).randbytes(2 * MIB))
    with pytest.raises(ImageError) as caught:
        opened(path)
    assert caught.value.kind is ErrorKind.INVALID_FORMAT


@pytest.mark.parametrize("cluster", [3000, 256, 4 * MIB])
def test_a_cluster_size_that_cannot_be_is_refused(tmp_path: Path, cluster: int) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(bytes(MIB))
    with pytest.raises(ImageError) as caught:
        opened(path, cluster_bytes=cluster)
    assert caught.value.kind is ErrorKind.OUT_OF_BOUNDS


def test_compressed_clusters_are_found(tmp_path: Path) -> None:
    raw, path = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    content = b"".join(bytes([number % 251]) * 65536 for number in range(64))
    raw.write_bytes(content)
    for codec in ("zlib", "zstd"):
        options = {"compression_type": codec}
        tapfs.convert(raw, path, target_format="qcow2", format="raw", compressed=True, options=options)
        overwrite(path, 0, bytes(512))
        with opened(path).image as image:
            assert image.read(0, len(content)) == content


def test_plain_options_know_nothing_of_a_scan(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    written(path, {}, MIB)
    with open_image(str(path), OpenOptions()) as image:
        assert image.layers[0].files.salvage is None
