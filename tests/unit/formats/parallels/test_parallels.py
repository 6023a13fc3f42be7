"""Parallels images of both kinds, built byte by byte: map, limits, extension, damage."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import tapfs as tapfs_package
from tapfs.disk.chain_map import map_chain, mapped_extents, merge_mapped
from tapfs.driver import OpenRequest
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.parallels import FORMAT
from tapfs.kernel.chain_map import map_blocks
from tapfs.testing.hostile import damage
from tapfs.testing.laws import check_map, check_split
from tapfs.testing.model import MemoryFile, read_extents
from tests.conftest import Ran

Run = Callable[..., Ran]
NEW, OLD = b"WithouFreSpacExt", b"WithoutFreeSpace"
CLOSED, OPEN = 0x312E3276, 0x746F6E59
CHOICE = random.Random(6)


@dataclass(frozen=True)
class Parallels:
    """What may be said of an image: which cluster of the disk lies in which cluster of the file."""

    magic: bytes = NEW
    cluster_sectors: int = 8
    sectors: int = 8 * 7 - 3
    #: By cluster of the disk: the number of its cluster behind the data offset, None for zeros.
    clusters: tuple[int | None, ...] = (None, 2, 0, None, 1, None, 3)
    spare_entries: int = 0
    implicit_data_offset: bool = False
    state: int = CLOSED
    flags: int = 0
    extension: bytes = b""
    noise: int = 1

    @property
    def cluster(self) -> int:
        return self.cluster_sectors * 512

    @property
    def data_offset(self) -> int:
        end = 64 + 4 * (len(self.clusters) + self.spare_entries)
        unit = 512 if self.implicit_data_offset else self.cluster
        return -(-end // unit) * unit

    def stored(self, number: int) -> bytes:
        return random.Random(self.noise + number).randbytes(self.cluster)

    def content(self) -> bytes:
        unit = 512 if self.magic == OLD else self.cluster
        table = [0 if each is None else (self.data_offset + each * self.cluster) // unit for each in self.clusters]
        count = max((each for each in self.clusters if each is not None), default=-1) + 1
        head = struct.pack(
            "<16sIIIIIQIIIQ",
            self.magic,
            2,
            16,
            1,
            self.cluster_sectors,
            len(table) + self.spare_entries,
            self.sectors | (0xDEAD << 32 if self.magic == OLD else 0),
            self.state,
            0 if self.implicit_data_offset else self.data_offset // 512,
            self.flags,
            (self.data_offset + count * self.cluster) // 512 if self.extension else 0,
        )
        out = (head + struct.pack(f"<{len(table)}I", *table)).ljust(self.data_offset, b"\0")
        out += b"".join(self.stored(number) for number in range(count))
        return out + self.extension.ljust(self.cluster if self.extension else 0, b"\0")

    def disk(self) -> bytes:
        out = b"".join(bytes(self.cluster) if each is None else self.stored(each) for each in self.clusters)
        return out[: self.sectors * 512].ljust(self.sectors * 512, b"\0")


IMAGES = {
    "new": Parallels(),
    "old": Parallels(magic=OLD),
    "old, data right behind the table": Parallels(magic=OLD, implicit_data_offset=True),
    "clusters of 63 sectors": Parallels(magic=OLD, cluster_sectors=63, sectors=63 * 7 - 60, implicit_data_offset=True),
    "new, clusters of 504 sectors": Parallels(cluster_sectors=504, sectors=504 * 7),
    "more entries than the disk has": Parallels(spare_entries=200),
    "in use": Parallels(state=OPEN),
    "of old software": Parallels(state=0),
    "nothing in it": Parallels(clusters=(None,) * 7),
}


def opened(content: bytes, **request: Any) -> Any:
    return FORMAT.open(MemoryFile(content), OpenRequest(**request))


@pytest.mark.parametrize("name", IMAGES)
def test_every_kind_is_read(name: str, tmp_path: Path) -> None:
    image = IMAGES[name]
    file = MemoryFile(image.content())
    assert FORMAT.probe(file.read(0, 4096), file.size()) == 100
    driver = FORMAT.open(file, OpenRequest())
    assert read_extents(driver, file, 0, driver.geometry.virtual_size) == image.disk()
    check_map(driver, 0, len(image.disk()))
    check_split(driver, 1000, len(image.disk()) - 1000)
    report = driver.check()
    assert (report.corruptions, report.leaks) == (0, 0)
    (tmp_path / "a.hds").write_bytes(image.content())
    with tapfs_package.open(tmp_path / "a.hds") as disk:
        assert disk.read(0, disk.size) == image.disk()


@pytest.mark.parametrize("name", IMAGES)
def test_the_engine_reads_the_table_as_the_driver_does(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.hds"
    path.write_bytes(IMAGES[name].content())
    with tapfs_package.open(path) as disk:
        blocks = list(map_blocks(disk.engine_disk, 0, disk.size, disk._chain.supply_map))
        found = list(merge_mapped(run for block in blocks for run in mapped_extents(block, [[str(path)]])))
        assert found == list(merge_mapped(map_chain(disk.layers, 0, disk.size)))


def test_a_size_that_contradicts_the_table_is_said() -> None:
    content = bytearray(Parallels().content())
    assert opened(bytes(content)).check().findings == []
    content[36:44] = (2 * Parallels().cluster_sectors).to_bytes(8, "little")
    report = opened(bytes(content)).check()
    assert (report.corruptions, report.leaks) == (0, 1)
    note, leak = report.findings
    assert note.message == "the block table has 7 entries for the 2 blocks of the disk"
    assert "blocks behind the end of the disk have places" in leak.message


def test_it_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "a.hds"
    path.write_bytes(Parallels().content())
    with pytest.raises(ImageError) as caught:
        tapfs_package.open(path, writable=True)
    assert caught.value.kind is ErrorKind.READ_ONLY


def test_what_a_check_notes() -> None:
    said = [finding.message for finding in opened(Parallels(state=OPEN, flags=1).content()).check().findings]
    assert said == ["the image was not closed by who wrote it", "the image says that it is empty, and it has data"]
    assert "unknown state 0x7" in opened(Parallels(state=7).content()).check().findings[0].message
    content = bytearray(Parallels().content() + b"leak" * 3000)
    assert opened(bytes(content)).check().leaked_bytes == 12000
    content[64 + 4 : 68 + 4] = content[64 + 8 : 68 + 8]
    (finding,) = (each for each in opened(bytes(content)).check().findings if "overlaps" in each.message)
    assert finding.message == "block 2 overlaps block 1"


@pytest.mark.parametrize(
    ("offset", "data", "kind", "said"),
    [
        (0, b"x", ErrorKind.INVALID_FORMAT, "no magic"),
        (16, b"\3\0\0\0", ErrorKind.UNSUPPORTED, "version 3"),
        (28, b"\0\0\0\0", ErrorKind.OUT_OF_BOUNDS, "a cluster has 0 sectors"),
        (28, b"\xff\xff\xff\xff", ErrorKind.OUT_OF_BOUNDS, "a cluster has 4294967295 sectors"),
        (32, b"\6\0\0\0", ErrorKind.CORRUPT, "has 7 clusters, the table has 6 entries"),
        (36, b"\xff\xff\xff\xff\0\0\0\0", ErrorKind.CORRUPT, "the table has 7 entries"),
        (48, b"\1\0\0\0", ErrorKind.CORRUPT, None),
    ],
)
def test_impossible_headers(offset: int, data: bytes, kind: ErrorKind, said: str | None) -> None:
    content = bytearray(replace(Parallels(), clusters=(None, 2, 0, None, 1, None, 3) + (None,) * 130).content())
    if said is not None and "7" in said:
        content = bytearray(Parallels().content())
    content[offset : offset + len(data)] = data
    if said is None:  # data that begins inside the table of 137 entries, of which the disk needs 7
        content[36:44] = (8 * 137).to_bytes(8, "little")
        said = "inside the table"
    with pytest.raises(ImageError, match=said) as caught:
        opened(bytes(content))
    assert caught.value.kind is kind


@pytest.mark.parametrize("entry", [0xFFFFFFFF, 7, 100])
def test_a_cluster_past_the_end_is_corrupt_and_no_zeros(entry: int) -> None:
    content = bytearray(Parallels().content())
    content[64:68] = entry.to_bytes(4, "little")
    driver = opened(bytes(content))
    with pytest.raises(ImageError, match="past the end of the file") as caught:
        driver.map(0, 4096)
    assert caught.value.kind is ErrorKind.CORRUPT
    assert driver.check().corruptions == 1


def extension(*places: int, spoilt: int = 0) -> bytes:
    """A format extension with one dirty bitmap whose table is `places`."""
    data = struct.pack("<Q16sII", 53, bytes(16), 8, len(places)) + struct.pack(f"<{len(places)}Q", *places)
    features = struct.pack("<QQII", 0x20385FAE252CB34A, 0, len(data), 0) + data.ljust(-(-len(data) // 8) * 8, b"\0")
    body = (features + bytes(24)).ljust(4096 - 24, b"\0")
    return struct.pack("<Q", 0xAB234CEF23DCEA87) + hashlib.md5(body).digest() + body[: len(body) - spoilt]  # noqa: S324


def test_the_clusters_of_bitmaps_are_not_leaked(tapfs: Run, tmp_path: Path) -> None:
    image = Parallels()
    place = (image.data_offset + 5 * image.cluster) // 512
    content = replace(image, extension=extension(0, 1, place)).content() + CHOICE.randbytes(4096)
    report = opened(content).check()
    assert (report.findings, report.leaks) == ([], 0)
    (tmp_path / "a.hds").write_bytes(content)
    assert tapfs("info", "--json", tmp_path / "a.hds").code == 0
    assert opened(content).details()["bitmaps"] == 1
    said = [finding.message for finding in opened(content[:-512]).check().findings]
    assert "a dirty bitmap lies past the end of the file" in said


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"x" * 4096, "does not begin with its magic"),
        (extension(1)[:-1] + b"x", "checksum of the format extension is wrong"),
        (
            struct.pack("<Q", 0xAB234CEF23DCEA87) + hashlib.md5(b"\1" * 4072).digest() + b"\1" * 4072,  # noqa: S324
            "has no end",
        ),
    ],
)
def test_a_damaged_extension(raw: bytes, said: str) -> None:
    content = replace(Parallels(), extension=raw).content()
    assert said in opened(content).check().findings[0].message
    assert read_extents(opened(content), MemoryFile(content), 0, 4096) == bytes(4096)
    cut = opened(content[:-512]).check()
    assert any("past the end of the file" in finding.message for finding in cut.findings)


def test_damaged_images_give_only_image_errors() -> None:
    for seed in range(300):
        choice = random.Random(seed)
        content = bytearray(choice.choice([*IMAGES.values(), replace(Parallels(), extension=extension(1))]).content())
        for _ in range(choice.choice([1, 2, 5])):
            damage(content, choice)
        try:
            driver = opened(bytes(content))
            driver.check()
            driver.details()
            driver.map(0, min(driver.geometry.virtual_size, 1 << 20))
        except ImageError:
            continue
