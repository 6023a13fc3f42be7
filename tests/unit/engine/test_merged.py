"""Merged maps of chains give what the layers give, whatever the layers are, and never what was before a commit."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest

import tapfs
from tapfs.disk.chain_map import map_chain, merge_mapped
from tapfs.disk.image import Image
from tests.scattered_images import scattered_qcow

SIZE = 3 << 20
KEY = b"a password"


class Chain:
    """Images on each other, and the bytes that a guest reads from the top one."""

    def __init__(self, folder: Path, seed: int, depth: int) -> None:
        self.choice = random.Random(seed)
        self.encrypted = self.choice.random() < 0.3
        self.formats: list[str] = []
        self.expected = bytearray()
        self.top = folder / "0"
        self._bottom()
        for number in range(1, depth):
            path = folder / str(number)
            # A child may be longer or shorter than its parent.
            size = SIZE if number == depth - 1 else SIZE - self.choice.randrange(0, 3) * 200 * 512
            self._make(path, size, parent=self.top)
            self.expected = (self.expected + bytes(size))[:size]
            self.top = path
            with self.opened(writable=True) as disk:
                self.change(disk, self.choice.randrange(1, 40))

    def _bottom(self) -> None:
        kind = self.choice.choice(["raw", "qcow", "packed"])
        size = SIZE - self.choice.randrange(0, 2) * 123 * 512
        data = bytearray(size)
        for _ in range(30):
            at = self.choice.randrange(size)
            piece = self.choice.randbytes(self.choice.randrange(1, 20000))
            data[at : at + len(piece)] = piece[: size - at]
        self.expected = data
        self.top.write_bytes(data)
        if kind != "raw":
            raw = self.top.rename(self.top.with_suffix(".raw"))
            options = {"cluster_size": self.choice.choice(["512", "4096", "65536"])}
            if self.encrypted and kind == "qcow":
                tapfs.convert(raw, self.top, format="raw", target_format="qcow", options=options, target_password=KEY)
            else:
                self.encrypted = False
                packed = kind == "packed"
                tapfs.convert(raw, self.top, format="raw", target_format="qcow", options=options, compressed=packed)
        else:
            self.encrypted = False
        self.formats = ["raw" if kind == "raw" else "qcow"]

    def _make(self, path: Path, size: int, parent: Path) -> None:
        options = {"cluster_size": self.choice.choice(["512", "1024", "4096", "32768"])}
        password = KEY if self.encrypted else None
        tapfs.create(
            str(path),
            "qcow",
            size,
            backing=str(parent),
            backing_format=self.formats[0],
            options=options,
            password=password,
        )
        self.formats.insert(0, "qcow")

    def opened(self, *, writable: bool, cache_bytes: int = 32 << 20) -> Image:
        return tapfs.open(
            self.top,
            format=self.formats[0],
            backing_formats=self.formats[1:],
            writable=writable,
            password=KEY if self.encrypted else None,
            cache_bytes=cache_bytes,
        )

    def change(self, disk: Image, count: int) -> None:
        for _ in range(count):
            at = self.choice.randrange(disk.size)
            length = min(self.choice.choice([1, 512, 4096, 30000, 200000]), disk.size - at)
            what = self.choice.choice(["write", "write", "zero"])
            data = self.choice.randbytes(length) if what == "write" else bytes(length)
            if what == "write":
                disk.write(at, data)
            else:
                disk.write_zeroes(at, length)
            self.expected[at : at + length] = data

    def compare(self, disk: Image, count: int) -> None:
        for _ in range(count):
            at = self.choice.randrange(disk.size)
            length = min(self.choice.choice([1, 4096, 50000, 1 << 20]), disk.size - at)
            assert disk.read(at, length) == self.expected[at : at + length]


@pytest.mark.parametrize("seed", range(12))
def test_a_chain_reads_and_maps_as_its_layers_do(tmp_path: Path, seed: int) -> None:
    chain = Chain(tmp_path, seed, depth=2 + seed % 5)
    for cache_bytes in (32 << 20, 40000):
        with chain.opened(writable=False, cache_bytes=cache_bytes) as disk:
            for _ in range(3):
                chain.compare(disk, 25)
                assert list(disk.extents()) == list(merge_mapped(map_chain(disk.layers, 0, disk.size)))
            assert disk.statistics().cache_bytes <= max(cache_bytes, 600 << 10)


@pytest.mark.parametrize("seed", range(6))
def test_writes_to_the_top_change_what_is_merged(tmp_path: Path, seed: int) -> None:
    chain = Chain(tmp_path, 100 + seed, depth=3)
    with chain.opened(writable=True, cache_bytes=(32 << 20) if seed % 2 else 40000) as disk:
        for _ in range(12):
            assert disk.read(0, disk.size) == chain.expected
            chain.compare(disk, 5)
            chain.change(disk, 4)
            chain.compare(disk, 5)
            at = chain.choice.randrange(disk.size - 70000)
            disk.discard(at, 70000)  # whatever it shows then, both ways agree
            shown = disk.read(at, 70000)
            chain.expected[at : at + 70000] = shown
            if chain.choice.random() < 0.3:
                disk.flush()
            assert list(disk.extents()) == list(merge_mapped(map_chain(disk.layers, 0, disk.size)))
    with chain.opened(writable=False) as disk:
        assert disk.read(0, disk.size) == chain.expected


def test_a_long_chain_costs_one_look_at_the_cache(tmp_path: Path) -> None:
    below, depth = "", 30
    for number in range(depth):
        scattered_qcow(tmp_path / f"{number}", 1 << 20, 8, data=True, seed=number, backing=below)
        below = f"{number}"
    with tapfs.open(tmp_path / below, backing_formats=["qcow"] * (depth - 1)) as disk:
        expected = [disk.read(offset, 4096) for offset in range(0, 1 << 20, 4096)]
        before = disk.statistics()
        assert [disk.read(offset, 4096) for offset in range(0, 1 << 20, 4096)] == expected
        after = disk.statistics()
        assert after.cache_misses == before.cache_misses
        assert after.cache_hits - before.cache_hits == 256
        before = after
        assert len(list(disk.extents())) > depth
        assert disk.statistics().cache_hits - before.cache_hits < 40


def test_nobody_reads_a_merged_map_from_before_a_write(tmp_path: Path) -> None:
    """Readers beside a writer that allocates, discards and flushes: the number read never goes back."""
    for name, below in (("a", ""), ("b", "a"), ("c", "b")):
        scattered_qcow(tmp_path / name, 1 << 20, 60, data=True, seed=len(below) + 1, backing=below)
    clusters = list(range(1, 250, 7))
    acknowledged = dict.fromkeys(clusters, 0)
    problems: list[str] = []
    stop = threading.Event()

    def read(seed: int, disk: Image) -> None:
        choice = random.Random(seed)
        buffer = bytearray(8)
        while not stop.is_set() and not problems:
            cluster = choice.choice(clusters)
            least = acknowledged[cluster]
            disk.read_into(cluster << 12, buffer)
            found = int.from_bytes(buffer, "big")
            if found < least:
                problems.append(f"cluster {cluster}: read {found} after {least} had been written")

    with tapfs.open(tmp_path / "c", writable=True, backing_formats=["qcow", "qcow"], cache_bytes=20000) as disk:
        for cluster in clusters:
            disk.write(cluster << 12, bytes(8))
        threads = [threading.Thread(target=read, args=(seed, disk)) for seed in range(3)]
        for thread in threads:
            thread.start()
        choice = random.Random(9)
        for number in range(1, 500):
            cluster = choice.choice(clusters)
            disk.discard((cluster + 2) << 12, 4096)  # the parents show again, and the place is used again
            disk.write((cluster + 2) << 12, b"\xff" * 4096)
            if number % 3 == 0:
                disk.write_zeroes(cluster << 12, 4096) if acknowledged[cluster] == 0 else None
            disk.write(cluster << 12, number.to_bytes(8, "big"))
            acknowledged[cluster] = number
            if number % 7 == 0:
                disk.flush()
        stop.set()
        for thread in threads:
            thread.join()
    assert problems == []
