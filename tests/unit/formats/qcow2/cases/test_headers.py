"""QEMU's published cases about headers and names, as tests of tapfs: 031, 036, 080, 126, 137."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

import tapfs
from tapfs import ErrorKind, ImageError
from tapfs.driver import OpenRequest
from tapfs.formats.qcow2 import FORMAT
from tapfs.testing.model import MemoryFile
from tests.conftest import Ran
from tests.qcow2_images import COPIED, Fields, Plain
from tests.unit.formats.qcow2.cases.small_images import (
    CLUSTER,
    clean,
    entry_at,
    new,
    peek,
    poke,
    put,
    raw,
    refcount_at,
    require,
)

Run = Callable[..., Ran]

UNKNOWN = 0x12345678, b"This is a test header extension"
FEATURE_NAMES = 0x6803F857


def with_extension(path: Path, extension: tuple[int, bytes]) -> None:
    """Put an extension behind the header, before those that are there."""
    data = bytearray(path.read_bytes())
    fields = Fields(bytes(data))
    at = 72 if fields.version == 2 else fields.number(100, 4)
    kind, content = extension
    there = struct.pack(">II", kind, len(content)) + content.ljust(-(-len(content) // 8) * 8, b"\0")
    name_at, name_bytes = fields.number(8, 8), fields.number(16, 4)
    end = name_at + name_bytes if name_at else at + 512
    moved = there + data[at:end]
    data[at : at + len(moved)] = moved
    if name_at:
        data[8:16] = (name_at + len(there)).to_bytes(8, "big")
    path.write_bytes(data)


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_031_an_unknown_extension_survives_every_change_of_the_header(tmp_path: Path, compat: str) -> None:
    raw(tmp_path / "base", 7, 64 * CLUSTER)
    path = new(tmp_path / "image", 64 * CLUSTER, compat=compat)
    with_extension(path, UNKNOWN)
    changes: list[Callable[[], object]] = [
        lambda: tapfs.rebase(path, None, unsafe=True),
        lambda: tapfs.rebase(path, "/some/backing/file/path", new_formats=["raw"], unsafe=True),
        lambda: tapfs.rebase(path, str(tmp_path / "base"), new_formats=["raw"], unsafe=True),
        lambda: put(path, (1, 0, 5 * CLUSTER)),
        lambda: tapfs.create_snapshot(path, "one"),
        lambda: tapfs.delete_snapshot(path, "one"),
        lambda: tapfs.rebase(path, None),
    ]
    if compat == "1.1":
        changes += [lambda: tapfs.add_bitmap(path, "b"), lambda: tapfs.remove_bitmap(path, "b")]
    for change in changes:
        change()
        assert UNKNOWN in list(Fields(path.read_bytes()).extensions())
        clean(path)


def names(*features: tuple[int, int, bytes]) -> tuple[int, bytes]:
    """A table of feature names: sort, bit, name."""
    return FEATURE_NAMES, b"".join(struct.pack(">BB46s", *each) for each in features)


#: Bits, names, and what the refusal says is needed.
FEATURES: dict[str, tuple[tuple[int, ...], list[tuple[int, bytes]], str]] = {
    "no table": ((63,), [], "bit 63"),
    "a name": ((63,), [names((0, 63, b"Test feature"))], "Test feature"),
    "several bits, no table": ((61, 62, 63), [], "bit 61, bit 62, bit 63"),
    "a name for the last": ((61, 62, 63), [names((0, 63, b"test"))], "bit 61, bit 62, test"),
    "names for two": ((61, 62, 63), [names((0, 61, b"a"), (0, 62, b"b"))], "a, b, bit 63"),
    "names for all": ((61, 62, 63), [names((0, 61, b"a"), (0, 62, b"b"), (0, 63, b"c"))], "a, b, c"),
    "names of other sorts": (
        (61, 62, 63),
        [names((1, 61, b"a"), (0, 62, b"b"), (2, 63, b"c"), (0, 60, b"d"))],
        "bit 61, b, bit 63",
    ),
}


@pytest.mark.parametrize("case", FEATURES)
def test_036_unknown_features_are_refused_by_name(case: str) -> None:
    bits, extensions, says = FEATURES[case]
    image = Plain(8 * CLUSTER, 12, incompatible=sum(1 << bit for bit in bits), extensions=extensions)
    with pytest.raises(ImageError) as raised:
        FORMAT.open(MemoryFile(image.build()), OpenRequest())
    assert raised.value.kind is ErrorKind.UNSUPPORTED
    assert set(raised.value.message.partition(": ")[2].split(", ")) == set(says.split(", "))


@pytest.mark.parametrize("change", ["write", "repair", "snapshot", "rebase", "bitmap"])
def test_036_a_change_clears_unknown_autoclear_bits(tmp_path: Path, change: str) -> None:
    """Whoever set them learns so that the image was changed by somebody who does not know them."""
    path = new(tmp_path / "image", 64 * CLUSTER)
    put(path, (1, 0, CLUSTER))
    poke(path, 88, 1 << 63 | 1 << 42)
    match change:
        case "write":
            put(path, (1, 5 * CLUSTER, CLUSTER))
        case "repair":
            poke(path, refcount_at(path, path.stat().st_size - CLUSTER), 0, 2)
            assert tapfs.repair(path).corruptions == 0
        case "snapshot":
            tapfs.create_snapshot(path, "one")
        case "rebase":
            tapfs.rebase(path, "/nowhere", new_formats=["raw"], unsafe=True)
        case _:
            tapfs.add_bitmap(path, "b")
            assert peek(path, 88) == 1, "bitmaps are known"
    assert peek(path, 88) & ~1 == 0


@pytest.mark.parametrize("change", ["write", "repair", "rebase", "resize", "amend"])
def test_the_bit_of_a_raw_data_file_means_nothing_without_one(tmp_path: Path, change: str) -> None:
    """QEMU opens no such image; what a writer does not know to be true it clears."""
    path = new(tmp_path / "image", 64 * CLUSTER)
    put(path, (1, 0, CLUSTER))
    poke(path, 88, 2)
    assert [each.host_offset for each in tapfs.check(path).findings] == [88]
    match change:
        case "write":
            put(path, (1, 5 * CLUSTER, CLUSTER))
        case "repair":
            poke(path, 72, 2)  # marked as corrupt
            assert tapfs.repair(path).corruptions == 0
            assert peek(path, 72) == 0
        case "rebase":
            tapfs.rebase(path, "/nowhere", new_formats=["raw"], unsafe=True)
        case "resize":
            tapfs.resize(path, 65 * CLUSTER)
        case _:
            tapfs.amend(path, {"lazy_refcounts": "on"})
    assert peek(path, 88) == 0
    assert tapfs.check(path).corruptions == 0


#: Fields ``(offset, number, width)`` that no reader may believe.
HOSTILE: dict[str, list[tuple[int, int, int]]] = {
    "header length": [(100, 0xFFFFFFFF, 4)],
    "header length with a sign": [(100, 0x7FFFFFFF, 4)],
    "extension, and a name far away": [(8, (1 << 64) - 1, 8), (112, 0x12345678, 4), (116, 0x7FFFFFFF, 4)],
    "extension, and the name in it": [(8, 116, 8), (16, 8, 4), (112, 0x12345678, 4), (116, 0x7FFFFFFF, 4)],
    "extension": [(112, 0x12345678, 4), (116, 0x7FFFFFFF, 4)],
    "refcount table, clusters": [(56, 0xFFFFFFFF, 4)],
    "refcount table, one too many": [(56, 0x20001, 4)],
    "refcount table off a cluster": [(48, 0x1234567890ABCDEF, 8)],
    "refcount table far away": [(48, 0xFFFFFFFFFFFF0000, 8), (56, 0x7F, 4)],
    "snapshots": [(60, 0xFFFFFFFF, 4)],
    "snapshots with a sign": [(60, 0x7FFFFFFF, 4)],
    "snapshots far away": [(64, 0xFFFFFFFFFFFF0000, 8), (60, 0xFFFF, 4)],
    "snapshots off a cluster": [(64, 0x1234567890ABCDEF, 8), (60, 1, 4)],
    "L1 entries": [(36, 0xFFFFFFFF, 4)],
    "L1 entries with a sign": [(36, 0x7FFFFFFF, 4)],
    "L1 far away": [(40, 0x7FFFFFFFFFFF0000, 8), (36, 0xFFFF, 4)],
    "L1 off a cluster": [(40, 0x1234567890ABCDEF, 8), (36, 1, 4)],
    "length of the parent's name": [(8, 0x1000, 8), (16, 0xFFFFFFFF, 4)],
}


@pytest.mark.parametrize("case", HOSTILE)
def test_080_a_field_that_cannot_be_is_an_error_at_its_place(tmp_path: Path, case: str) -> None:
    path = new(tmp_path / "image", 64 * CLUSTER)
    for at, number, width in HOSTILE[case]:
        poke(path, at, number, width)
    before = path.read_bytes()
    with pytest.raises(ImageError) as raised:
        tapfs.open(path, writable=True).close()
    # The one name that can be read is of a file that is not there.
    assert raised.value.offset is not None or raised.value.kind is ErrorKind.NOT_FOUND
    assert path.read_bytes() == before


@pytest.mark.parametrize("entry", [0xBFFFFFFFFFFF0000, 0x800000FFFFFF0000])
def test_080_no_snapshot_is_made_of_an_entry_that_leads_nowhere(tmp_path: Path, entry: int) -> None:
    path = new(tmp_path / "image", 64 * CLUSTER)
    put(path, (1, 0, CLUSTER))
    poke(path, entry_at(path, 0), entry)
    before = path.read_bytes()
    with pytest.raises(ImageError):
        tapfs.create_snapshot(path, "one")
    assert path.read_bytes() == before


def test_080_an_l1_table_of_no_entries_beside_a_snapshot(tmp_path: Path) -> None:
    path = new(tmp_path / "image", 64 * CLUSTER)
    tapfs.create_snapshot(path, "one")
    poke(path, 36, 0, 4)
    with pytest.raises(ImageError, match="too small for the disk"):
        tapfs.info(path)


@pytest.mark.parametrize("field", ["place", "entries"])
def test_080_a_snapshot_whose_l1_table_cannot_be_is_neither_read_nor_applied(tmp_path: Path, field: str) -> None:
    path = new(tmp_path / "image", 64 * CLUSTER)
    put(path, (1, 0, 8 * CLUSTER))
    tapfs.create_snapshot(path, "one")
    at = peek(path, 64)
    poke(path, *((at, peek(path, at) + 512, 8) if field == "place" else (at + 8, 1 << 28, 4)))
    before = path.read_bytes()
    uses: list[Callable[[], object]] = [
        lambda: tapfs.open(path, snapshot="one").read(0, 1),
        lambda: tapfs.apply_snapshot(path, "one"),
        lambda: tapfs.delete_snapshot(path, "one"),
        lambda: tapfs.create_snapshot(path, "two"),
    ]
    for use in uses:
        with pytest.raises(ImageError):
            use()
    assert path.read_bytes() == before
    require(path, (1, 0, 8 * CLUSTER))
    assert tapfs.check(path).corruptions > 0


@pytest.mark.parametrize("parent", ["image:base.qcow2", "./image:base.qcow2", "file:image:base.qcow2"])
def test_126_colons_in_names(tapfs: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parent: str) -> None:
    """A colon is a part of a name, wherever it stands; a parent is looked for in the folder of the overlay."""
    monkeypatch.chdir(tmp_path)
    assert tapfs("create", "-f", "qcow2", tmp_path / "image:base.qcow2", CLUSTER * 64).code == 0
    put(tmp_path / "image:base.qcow2", (7, 0, CLUSTER))
    for top in ("image:top.qcow2", f"{tmp_path}/other:top.qcow2"):
        made = tapfs("create", "-f", "qcow2", "-b", parent, "-F", "qcow2", top)
        assert (made.code, made.err) == (0, "")
        require(tmp_path / top, (7, 0, CLUSTER))


def test_137_options_that_cannot_be_change_nothing(tapfs: Run, tmp_path: Path) -> None:
    """One wrong option among right ones makes all of them void."""
    path = tmp_path / "image"
    for options in (
        "lazy_refcounts=42",
        "compat=1.1,foo=bar",
        "cluster_size=65536,refcount_bits=3",
        "overlap-check=none",
    ):
        ran = tapfs("create", "-f", "qcow2", "-o", options, path, "1M")
        assert ran.code != 0
        assert not path.exists()


@pytest.mark.parametrize("table", ["header", "refcount block"])
def test_137_no_option_turns_the_guard_of_metadata_off(tmp_path: Path, table: str) -> None:
    """The first refcount says that the header is free: the next new cluster would go over it."""
    path = new(tmp_path / "image", 64 * CLUSTER, lazy_refcounts="on")
    put(path, (1, 0, CLUSTER))
    place = 0 if table == "header" else peek(path, peek(path, 48))
    poke(path, refcount_at(path, place), 0, 2)
    before = path.read_bytes()
    disk = tapfs.open(path, writable=True)
    with pytest.raises(ImageError) as raised:
        disk.write(CLUSTER, b"x" * CLUSTER)
    assert raised.value.kind is ErrorKind.CORRUPT
    disk.abandon()
    assert path.read_bytes() == before
    assert Fields(before).number(entry_at(path, 0), 8) & COPIED
