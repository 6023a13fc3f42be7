"""QED images, built byte by byte: map, zero clusters, parents, limits, damage."""

from __future__ import annotations

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
from tapfs.extent import Kind
from tapfs.formats.qed import FORMAT
from tapfs.kernel.chain_map import map_blocks
from tapfs.testing.hostile import damage
from tapfs.testing.laws import check_map, check_split
from tapfs.testing.model import MemoryFile, read_extents
from tests.conftest import Ran
from tests.property.test_table_decoder import AskedError, ask

Run = Callable[..., Ran]
CHOICE = random.Random(6)
HAS_BACKING, NEED_CHECK, RAW_BACKING = 1, 2, 4


@dataclass(frozen=True)
class Qed:
    """What may be said of an image of two tables; `clusters` has words: free, zero, or data at the next place."""

    cluster: int = 4096
    table_clusters: int = 2
    size: int = 1100 * 4096 - 512
    clusters: tuple[tuple[int, str], ...] = ((0, "data"), (1, "zero"), (3, "data"), (1023, "data"), (1024, "data"))
    features: int = 0
    name: bytes = b""

    @property
    def entries(self) -> int:
        return self.table_clusters * self.cluster // 8

    @property
    def table_bytes(self) -> int:
        return self.table_clusters * self.cluster

    def stored(self, index: int) -> bytes:
        return random.Random(index).randbytes(self.cluster)

    def content(self) -> bytes:
        l1_at = self.cluster
        tables = -(-self.size // (self.entries * self.cluster))
        l2_at = [l1_at + self.table_bytes * (1 + number) for number in range(tables)]
        words = [[0] * self.entries for _ in range(tables)]
        data = b""
        start = l1_at + self.table_bytes * (1 + tables)
        for index, what in self.clusters:
            words[index // self.entries][index % self.entries] = 1 if what == "zero" else start + len(data)
            data += self.stored(index) if what == "data" else b""
        head = struct.pack(
            "<4sIIIQQQQQII",
            b"QED\0",
            self.cluster,
            self.table_clusters,
            1,
            self.features,
            0,
            0,
            l1_at,
            self.size,
            64 if self.name else 0,
            len(self.name),
        )
        out = (head + self.name).ljust(l1_at, b"\0")
        out += struct.pack(f"<{tables}Q", *l2_at).ljust(self.table_bytes, b"\0")
        return out + b"".join(struct.pack(f"<{self.entries}Q", *each) for each in words) + data

    def disk(self, parent: bytes = b"") -> bytes:
        out = bytearray(parent[: self.size].ljust(self.size, b"\0"))
        for index, what in self.clusters:
            piece = self.stored(index) if what == "data" else bytes(self.cluster)
            at = index * self.cluster
            out[at : at + self.cluster] = piece[: self.size - at]
        return bytes(out)


GOOD = Qed()


def opened(content: bytes, **request: Any) -> Any:
    return FORMAT.open(MemoryFile(content), OpenRequest(**request))


@pytest.mark.parametrize(
    "image",
    [
        GOOD,
        Qed(table_clusters=1, size=600 * 4096, clusters=((0, "data"), (511, "zero"), (599, "data"))),
        Qed(cluster=65536, table_clusters=1, size=5 << 20, clusters=((7, "data"), (8, "zero"), (79, "data"))),
        Qed(features=NEED_CHECK),
        Qed(clusters=()),
    ],
)
def test_images_are_read(image: Qed, tmp_path: Path) -> None:
    file = MemoryFile(image.content())
    assert FORMAT.probe(file.read(0, 4096), file.size()) == 100
    driver = FORMAT.open(file, OpenRequest())
    assert read_extents(driver, file, 0, image.size) == image.disk()
    check_map(driver, 0, image.size)
    check_split(driver, 1000, image.size - 1000)
    report = driver.check()
    assert (report.corruptions, report.leaks) == (0, 0), report.findings
    path = tmp_path / "a.qed"
    path.write_bytes(image.content())
    with tapfs_package.open(path) as disk:
        assert disk.read(0, disk.size) == image.disk()
        blocks = list(map_blocks(disk.engine_disk, 0, disk.size, ask))
        found = list(merge_mapped(run for block in blocks for run in mapped_extents(block, [[str(path)]])))
        assert found == list(merge_mapped(map_chain(disk.layers, 0, disk.size)))


def test_a_zero_cluster_hides_the_parent_and_a_free_one_shows_it(tapfs: Run, tmp_path: Path) -> None:
    parent = CHOICE.randbytes(900 * 4096 + 100)
    (tmp_path / "base.raw").write_bytes(parent)
    for features in (HAS_BACKING, HAS_BACKING | RAW_BACKING):
        image = replace(GOOD, features=features, name=b"base.raw")
        (tmp_path / "a.qed").write_bytes(image.content())
        with tapfs_package.open(tmp_path / "a.qed") as disk:
            assert disk.read(0, disk.size) == image.disk(parent)
        reference = opened(image.content()).geometry.backing
        assert reference is not None
        assert (reference.name, reference.format) == ("base.raw", "raw" if features & RAW_BACKING else None)
    assert tapfs("info", "--json", tmp_path / "a.qed").code == 0
    (tmp_path / "base.raw").unlink()
    assert tapfs("convert", "-O", "raw", tmp_path / "a.qed", tmp_path / "out").code == 17


def test_an_empty_run_ends_at_the_next_table() -> None:
    content = bytearray(GOOD.content())
    content[4096:4104] = bytes(8)
    driver = opened(bytes(content))
    run = driver.empty_run(5000, GOOD.size)
    assert (run.offset, run.end, run.kind) == (5000, 1024 * 4096, Kind.UNALLOCATED)
    assert driver.empty_run(1024 * 4096, GOOD.size) is None


@pytest.mark.parametrize(
    ("offset", "data", "kind", "said"),
    [
        (0, b"x", ErrorKind.INVALID_FORMAT, "no magic"),
        (4, b"\0\1\0\0", ErrorKind.OUT_OF_BOUNDS, "cluster_size is 256"),
        (4, b"\1\x10\0\0", ErrorKind.OUT_OF_BOUNDS, "cluster_size is 4097"),
        (8, b"\3\0\0\0", ErrorKind.OUT_OF_BOUNDS, "table_size is 3"),
        (16, b"\x08", ErrorKind.UNSUPPORTED, "unknown features 0x8"),
        (16, b"\1", ErrorKind.CORRUPT, "the name of the parent has 0 bytes"),
        (40, b"\1", ErrorKind.CORRUPT, "the L1 table at 0x1001 is not aligned"),
        (46, b"\xff", ErrorKind.CORRUPT, "not in the file"),
        (48, b"\1", ErrorKind.CORRUPT, "must be whole sectors"),
        (54, b"\xff", ErrorKind.CORRUPT, "at most 1024 L2 tables"),
    ],
)
def test_impossible_headers(offset: int, data: bytes, kind: ErrorKind, said: str) -> None:
    content = bytearray(GOOD.content())
    content[offset : offset + len(data)] = data
    with pytest.raises(ImageError, match=said) as caught:
        opened(bytes(content))
    assert caught.value.kind is kind


@pytest.mark.parametrize("place", [2, 512, 0, 4096, 1 << 40, 1 << 63, (1 << 63) + (1 << 15)])
@pytest.mark.parametrize("table", [False, True])
def test_impossible_places_are_named_by_both(tmp_path: Path, place: int, *, table: bool) -> None:
    content = bytearray(GOOD.content())
    at = 4096 if table else 4096 + 8192 + 8
    if place == 0:
        place = 8192  # inside the L1 table
    content[at : at + 8] = place.to_bytes(8, "little")
    driver = opened(bytes(content))
    wanted = 0 if table else driver.header.cluster_size
    with pytest.raises(ImageError, match=f"L{1 if table else 2} entry {0 if table else 1}") as caught:
        driver.map(wanted, 1)
    assert (caught.value.kind, caught.value.offset) == (ErrorKind.CORRUPT, at)
    assert driver.check().corruptions >= 1
    path = tmp_path / "a.qed"
    path.write_bytes(content)
    with tapfs_package.open(path) as disk, pytest.raises(AskedError):
        list(map_blocks(disk.engine_disk, wanted, wanted + 1, ask))


def test_what_a_check_finds() -> None:
    content = bytearray(replace(GOOD, features=NEED_CHECK).content())
    l2 = 4096 + 8192
    content[l2 + 16 : l2 + 24] = content[l2 : l2 + 8]
    said = [finding.message for finding in opened(bytes(content)).check().findings]
    assert said[0].startswith("a writer has not closed the image")
    assert "the cluster of L2 entry 2 of table 0 overlaps the cluster of L2 entry 0 of table 0" in said
    report = opened(GOOD.content() + b"leak" * 2048).check()
    assert (report.leaked_bytes, report.corruptions) == (8192, 0)


def test_damaged_images_give_only_image_errors() -> None:
    for seed in range(200):
        choice = random.Random(seed)
        content = bytearray(choice.choice([GOOD, Qed(features=1, name=b"base.raw")]).content())
        for _ in range(choice.choice([1, 2, 5])):
            damage(content, choice)
        try:
            driver = opened(bytes(content))
            driver.check()
            driver.details()
            driver.empty_run(0, driver.geometry.virtual_size)
            driver.map(0, min(driver.geometry.virtual_size, 1 << 20))
        except ImageError:
            continue
