"""QEMU's published cases about writes, zeros and discards, as tests of tapfs: 027, 066, 073, 090, 179, 271, 290."""

from __future__ import annotations

import random
from itertools import permutations
from pathlib import Path

import pytest

import tapfs
from tapfs.extent import Kind, clip
from tests.qcow2_images import COPIED, ZERO, Fields, Plain, by_hand, deflated, packed_entry
from tests.unit.formats.qcow2.cases.small_images import CLUSTER, clean, entry_at, new, peek, put, raw, require

K64 = 1 << 16


@pytest.mark.parametrize("options", [{}, {"compat": "0.10"}, {"extended_l2": "on", "cluster_size": "65536"}], ids=str)
def test_027_a_small_write_zeroes_the_rest_of_its_cluster(tmp_path: Path, options: dict[str, str]) -> None:
    """The cluster held other bytes before, which must not come back."""
    path = new(tmp_path / "image", 8 * K64, None, **({"cluster_size": "65536"} | options))
    put(path, (0xDE, 0, 4 * K64))
    with tapfs.open(path, writable=True) as disk:
        disk.discard(0, 4 * K64)
    put(path, (0x0A, 5 * K64 + 1024, 2048), (0x0B, 7 * K64 - 100, 200))
    require(path, (0, 4 * K64, K64 + 1024), (0x0A, 5 * K64 + 1024, 2048), (0, 5 * K64 + 3072, 2 * K64 - 3172))
    require(path, (0x0B, 7 * K64 - 100, 200), (0, 7 * K64 + 100, K64 - 100))
    clean(path)


def test_066_discarded_zero_clusters_with_a_place_do_not_leak(tmp_path: Path) -> None:
    path = new(tmp_path / "image", 64 * CLUSTER, preallocation="metadata")
    with tapfs.open(path, writable=True) as disk:
        disk.write(0, b"x" * 4 * CLUSTER)
        disk.flush()
        disk.write_zeroes(0, 8 * CLUSTER)
        disk.flush()
        disk.discard(0, 8 * CLUSTER)
    require(path, (0, 0, 8 * CLUSTER))
    clean(path)
    # The same where another program has written the entries: zero, and a place set aside.
    placed = {number: (5 + number) * CLUSTER | COPIED | ZERO for number in range(4)}
    path.write_bytes(Plain(8 * CLUSTER, 12, entries=placed, file_clusters=9).build())
    with tapfs.open(path, writable=True) as disk:
        disk.discard(0, 4 * CLUSTER)
    require(path, (0, 0, 8 * CLUSTER))
    clean(path)


@pytest.mark.parametrize("pair", list(permutations(["data", "nothing", "packed", "zeros"], 2)), ids=" then ".join)
def test_073_a_run_ends_where_the_next_cluster_is_of_another_kind(tmp_path: Path, pair: tuple[str, str]) -> None:
    """One read goes over two clusters of different kinds, whose places would follow each other."""
    payload = deflated(b"\x33" * CLUSTER)
    entries = {"data": 5 * CLUSTER | COPIED, "nothing": 0, "zeros": 6 * CLUSTER | COPIED | ZERO}
    entries["packed"] = packed_entry(7 * CLUSTER, len(payload), 12)
    content = {5: b"\x11" * CLUSTER, 6: b"\xee" * CLUSTER, 7: payload}
    if pair == ("zeros", "data"):  # in the host file, too, the second cluster follows the first
        entries |= {"zeros": 5 * CLUSTER | COPIED | ZERO, "data": 6 * CLUSTER | COPIED}
        content |= {5: b"\xee" * CLUSTER, 6: b"\x11" * CLUSTER}
    image = Plain(2 * CLUSTER, 12, entries={at: entries[kind] for at, kind in enumerate(pair)}, content=content)
    image.backing, image.extensions = b"base", [(0xE2792ACA, b"raw")]
    raw(tmp_path / "base", 0x22, 2 * CLUSTER)
    path = tmp_path / "image"
    path.write_bytes(image.build())
    bytes_of = {"data": 0x11, "nothing": 0x22, "packed": 0x33, "zeros": 0}
    for start, length in ((0, 2 * CLUSTER), (100, CLUSTER), (CLUSTER - 1, 2)):
        with tapfs.open(path) as disk:
            whole = b"".join(bytes([bytes_of[kind]]) * CLUSTER for kind in pair)
            assert disk.read(start, length) == whole[start : start + length]
    assert by_hand(path.read_bytes(), b"\x22" * 2 * CLUSTER) == whole


def test_090_a_discarded_compressed_cluster_leaves_its_neighbour(tmp_path: Path) -> None:
    """Two payloads share one host cluster, which the discard of one must not free."""
    first, second = b"\x2a" * CLUSTER, b"\x17" * CLUSTER
    (tmp_path / "raw").write_bytes(first + second)
    path = tmp_path / "image"
    options = {"cluster_size": str(CLUSTER)}
    tapfs.convert(tmp_path / "raw", path, format="raw", target_format="qcow2", compressed=True, options=options)
    fields = Fields(path.read_bytes())
    places = {fields.number(entry_at(path, number), 8) & (1 << 57) - 1 for number in range(2)}
    assert len({place // CLUSTER for place in places}) == 1
    with tapfs.open(path, writable=True) as disk:
        disk.discard(CLUSTER, CLUSTER)
        disk.flush()
        # What is written now goes anywhere but over the payload that is left.
        disk.write(CLUSTER, b"y" * 100)
        disk.flush()
        assert disk.read(0, CLUSTER) == first
        disk.discard(0, 2 * CLUSTER)
    require(path, (0, 0, 2 * CLUSTER))
    clean(path)


def test_179_zeros_take_no_places_and_hide_the_parent(tmp_path: Path) -> None:
    base = new(tmp_path / "base", 64 * CLUSTER)
    put(base, (0x11, 0, 32 * CLUSTER))
    path = new(tmp_path / "image", 64 * CLUSTER, base)
    put(path, (0x22, 8 * CLUSTER, 8 * CLUSTER))
    before = path.stat().st_size
    with tapfs.open(path, writable=True) as disk:
        for start in (4, 10, 40):  # over the parent, over data, over nothing at all
            disk.write_zeroes(start * CLUSTER, 2 * CLUSTER)
        disk.flush()
        shown = clip(disk.layers[0].driver.map(0, disk.size), 4 * CLUSTER, 2 * CLUSTER)
        assert [each.kind for each in shown] == [Kind.ZERO]
        assert disk.read(10 * CLUSTER, 2 * CLUSTER) == bytes(2 * CLUSTER)
        # What reads as zeros already is not written again, in whole or in part.
        for offset, length in ((4 * CLUSTER, CLUSTER), (4 * CLUSTER + 1, 100), (10 * CLUSTER + 5, CLUSTER)):
            disk.write_zeroes(offset, length)
            assert disk.unflushed_bytes == 0
        # A part of a cluster of the parent's is copied, zeros in the middle.
        disk.write_zeroes(20 * CLUSTER + 100, CLUSTER)
    # What was over data gave its clusters back, and the two of the last piece took no others.
    assert path.stat().st_size <= before + 2 * CLUSTER
    require(path, (0, 4 * CLUSTER, 2 * CLUSTER), (0x22, 8 * CLUSTER, 2 * CLUSTER), (0, 10 * CLUSTER, 2 * CLUSTER))
    require(path, (0x11, 20 * CLUSTER, 100), (0, 20 * CLUSTER + 100, CLUSTER), (0x11, 21 * CLUSTER + 100, CLUSTER))
    clean(path)


#: What is done to subclusters of 2 KiB: the cluster, the first, offset in it and length in bytes.
STEPS = [
    *[
        ("write", 0, sub, at, length)
        for sub, at, length in ((0, 0, 1024), (1, 1024, 512), (2, 1024, 1024), (3, 0, 2048))
    ],
    *[("write", 0, sub, at, length) for sub, at, length in ((4, 0, 6144), (7, 1024, 4096), (16, 0, 1024))],
    ("write", 0, 31, 1024, 4096),
    ("zero", 0, 1, 0, 2048),
    ("zero", 0, 0, 0, K64),
    ("write", 0, 0, 0, K64),
    ("zero", 0, 0, 0, K64 // 2),
    ("discard", 0, 0, 0, K64),
    ("write", 0, 1, 1024, 512),
    ("zero", 2, 15, 1024, 2 * K64),
    ("write", 5, 12, 0, 3 * K64),
    ("discard", 6, 3, 100, K64),
    ("zero", 8, 0, 0, K64 // 2 + 700),
]


@pytest.mark.parametrize("parent", [True, False])
def test_271_subclusters(tmp_path: Path, *, parent: bool) -> None:
    """After each step the disk is right, and its bitmap names no subcluster that nobody has written or zeroed."""
    size = 9 * K64 - 3 * 1024
    base = raw(tmp_path / "base", 0xFF, size) if parent else None
    path = new(tmp_path / "image", size, base, extended_l2="on", cluster_size=str(K64))
    expected = bytearray(base.read_bytes() if base else bytes(size))
    touched: set[int] = set()
    for number, (what, cluster, sub, at, most) in enumerate(STEPS, start=1):
        offset = cluster * K64 + sub * 2048 + at
        length = min(most, size - offset)
        with tapfs.open(path, writable=True) as disk:
            if what == "write":
                disk.write(offset, bytes([number]) * length)
                expected[offset : offset + length] = bytes([number]) * length
            elif what == "zero":
                disk.write_zeroes(offset, length)
                expected[offset : offset + length] = bytes(length)
            else:
                disk.discard(offset, length)
                expected[offset : offset + length] = disk.read(offset, length)
            assert disk.read(0, size) == expected
        touched |= set(range(offset // 2048, (offset + length - 1) // 2048 + 1))
        assert by_hand(path.read_bytes(), base.read_bytes() if base else b"") == expected
        for each in range(-(-size // K64)):
            bitmap = peek(path, entry_at(path, each) + 8)
            named = {each * 32 + bit for bit in range(32) if (bitmap | bitmap >> 32) >> bit & 1}
            assert named <= touched, f"step {number}, cluster {each}"
        clean(path)


@pytest.mark.parametrize("parent", [True, False])
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_290_a_discard_never_shows_the_parent(tmp_path: Path, compat: str, *, parent: bool) -> None:
    """Version 2 has no zeros to hide the parent with: there the clusters stay, and hold zeros."""
    base = raw(tmp_path / "base", 0xFF, 32 * CLUSTER) if parent else None
    path = new(tmp_path / "image", 32 * CLUSTER, base, compat=compat)
    put(path, (1, 0, 32 * CLUSTER))
    with tapfs.open(path, writable=True) as disk:
        disk.discard(0, 32 * CLUSTER)
    require(path, (0, 0, 32 * CLUSTER))
    with tapfs.open(path) as disk:
        (extent,) = disk.layers[0].driver.map(0, disk.size)
    hidden = Kind.DATA if compat == "0.10" else Kind.ZERO
    assert extent.kind is (hidden if parent else Kind.UNALLOCATED)
    clean(path)


def test_290_zeros_over_a_parent_of_version_2_are_written(tmp_path: Path) -> None:
    base = raw(tmp_path / "base", 0xFF, 32 * CLUSTER)
    path = new(tmp_path / "image", 32 * CLUSTER, base, compat="0.10")
    choice = random.Random(290)
    expected = bytearray(base.read_bytes())
    with tapfs.open(path, writable=True) as disk:
        for _ in range(6):
            offset = choice.randrange(31 * CLUSTER)
            length = min(choice.randrange(1, 5 * CLUSTER), len(expected) - offset)
            disk.write_zeroes(offset, length)
            expected[offset : offset + length] = bytes(length)
        assert disk.read(0, disk.size) == expected
    assert by_hand(path.read_bytes(), base.read_bytes()) == expected
    clean(path)
