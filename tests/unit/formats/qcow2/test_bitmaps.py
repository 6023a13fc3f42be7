"""qcow2 bitmaps: their bits against a slow reader, what edits refuse before any change, and what they keep."""

from __future__ import annotations

import itertools
import random
import struct

import pytest

from tapfs import ErrorKind, ImageError
from tapfs.driver import Bitmapped, OpenRequest
from tapfs.extent import Range
from tapfs.formats.qcow2 import FORMAT
from tapfs.formats.qcow2.bitmap_bits import clusters_of
from tapfs.testing.model import MemoryFile
from tests.qcow2_edits import Edit, done, driver_of, refused
from tests.qcow2_images import Fields, audit, created, make, opened

SIZE = 3_000_000 // 512 * 512
EXTENSION = 0x23852875


def reader_of(file: MemoryFile) -> Bitmapped:
    return FORMAT.open(file, OpenRequest())


def ranges(file: MemoryFile, name: str) -> list[Range]:
    return list(reader_of(file).bitmap_ranges(name))


def directory(file: MemoryFile) -> int:
    """Where the directory lies."""
    content = next(data for kind, data in Fields(bytes(file.data)).extensions() if kind == EXTENSION)
    place: int = struct.unpack_from(">Q", content, 16)[0]
    return place


def bit_by_bit(file: MemoryFile, size: int) -> set[int]:
    """The marked pieces of the first bitmap, by a look at each bit."""
    data = bytes(file.data)
    fields = Fields(data)
    table, entries, _, _, bits = struct.unpack_from(">QIIBB", data, directory(file))
    found: set[int] = set()
    for piece in range(-(-size >> bits)):
        index, inside = divmod(piece, fields.cluster * 8)
        assert index < entries
        entry = fields.number(table + 8 * index, 8)
        content = entry & 0x00FFFFFFFFFFFE00
        if entry & 1 or (content and data[content + inside // 8] >> inside % 8 & 1):
            found.add(piece)
    return found


@pytest.mark.parametrize("granularity", [512, 4096, 1 << 20, 1 << 31])
@pytest.mark.parametrize("cluster", ["512", "4096"])
def test_stored_ranges_are_read_again(cluster: str, granularity: int) -> None:
    choice = random.Random(granularity)
    file = created(SIZE, {"cluster_size": cluster})
    done(file, lambda each: each.add_bitmap("b", granularity, enabled=True))
    assert ranges(file, "b") == []
    for count in (1, 3, 40):
        edges = sorted(choice.sample(range(SIZE), 2 * count))
        wanted = [Range(edges[at], edges[at + 1] - edges[at]) for at in range(0, len(edges), 2)]
        done(file, lambda each, wanted=wanted: each.store_bitmap("b", wanted))
        pieces = {
            piece
            for offset, length in wanted
            for piece in range(offset // granularity, (offset + length - 1) // granularity + 1)
        }
        assert bit_by_bit(file, SIZE) == pieces
        read = ranges(file, "b")
        assert {at // granularity for offset, length in read for at in range(offset, offset + length, 512)} == pieces
        assert all(left.end < right.offset for left, right in itertools.pairwise(read))
        assert read[-1].end <= SIZE
        found = audit(bytes(file.data))
        assert (found.corruptions, found.leaks) == ([], [])


def test_a_cluster_of_ones_takes_no_space() -> None:
    file = created(SIZE, {"cluster_size": "512"})
    done(file, lambda each: each.add_bitmap("b", 512, enabled=True))
    length = len(file.data)
    done(file, lambda each: each.store_bitmap("b", [Range(0, 512 * 512 * 8)]))
    assert len(file.data) <= length + 512
    assert ranges(file, "b") == [Range(0, 512 * 512 * 8)]
    assert [content for _, content in clusters_of([Range(0, 512 * 512 * 8)], 512, 512)] == [b"\xff" * 512]


@pytest.mark.parametrize(
    ("name", "granularity", "kind"),
    [
        ("b", None, ErrorKind.EXISTS),
        ("", None, ErrorKind.INVALID_ARGUMENT),
        ("x" * 1024, None, ErrorKind.INVALID_ARGUMENT),
        ("new", 1000, ErrorKind.INVALID_ARGUMENT),
        ("new", 256, ErrorKind.INVALID_ARGUMENT),
        ("new", 1 << 32, ErrorKind.INVALID_ARGUMENT),
        ("new", 0, ErrorKind.INVALID_ARGUMENT),
    ],
)
def test_what_a_new_bitmap_cannot_be(name: str, granularity: int | None, kind: ErrorKind) -> None:
    file = created(SIZE)
    done(file, lambda each: each.add_bitmap("b", None, enabled=True))
    assert refused(file, lambda each: each.add_bitmap(name, granularity, enabled=True)).kind is kind


@pytest.mark.parametrize(("cluster", "usual"), [("512", 4096), ("16384", 16384), ("2097152", 65536)])
def test_the_usual_granularity_is_that_of_qemu(cluster: str, usual: int) -> None:
    file = created(SIZE, {"cluster_size": cluster})
    done(file, lambda each: each.add_bitmap("b", None, enabled=False))
    assert [(each.granularity, each.enabled, each.consistent) for each in reader_of(file).bitmaps()] == [
        (usual, False, True)
    ]


def test_a_bitmap_that_is_too_large_says_what_is_not() -> None:
    file = created(8 << 40, {"cluster_size": "65536"})
    error = refused(file, lambda each: each.add_bitmap("b", 512, enabled=True))
    assert error.kind is ErrorKind.UNSUPPORTED
    assert error.remedy == "the least granularity is 2048"
    done(file, lambda each: each.add_bitmap("b", 2048, enabled=True))


@pytest.mark.parametrize("size", [0, (2 << 40) + 512])
def test_a_size_that_a_bitmap_cannot_follow_is_refused(size: int) -> None:
    file = created(SIZE)
    done(file, lambda each: each.add_bitmap("b", 512, enabled=size == 0))
    error = refused(file, lambda each: each.make_room(size) if size else each.resize(size))
    assert error.kind is ErrorKind.OUT_OF_BOUNDS
    assert error.remedy == "remove it (tapfs bitmap --remove)"
    done(file, lambda each: each.make_room(2 << 40))
    done(file, lambda each: each.resize(2 << 40))
    assert FORMAT.open(file, OpenRequest()).check().corruptions == 0


def test_a_disk_of_no_bytes_has_no_bitmaps() -> None:
    file = created(0)
    assert refused(file, lambda each: each.add_bitmap("b", None, enabled=True)).kind is ErrorKind.UNSUPPORTED


@pytest.mark.parametrize("entries", [0, 8193])
def test_a_table_of_a_length_that_qemu_refuses_is_found(entries: int) -> None:
    file = created(4 << 40 if entries else 512)
    done(file, lambda each: each.add_bitmap("b", 1 << 20, enabled=True))
    place = directory(file)
    # The size of a disk with so many entries of pieces of 512 bytes, or of one without any.
    file.data[24:32] = struct.pack(">Q", entries * 8 * 65536 * 512)
    file.data[place + 8 : place + 12] = struct.pack(">I", entries)
    file.data[place + 17] = 9
    found = [each.message for each in FORMAT.open(file, OpenRequest(lenient=True)).check().findings]
    assert f"bitmap b has a table of {entries} entries, which none may have" in found


def test_version_2_has_no_bitmaps() -> None:
    file = created(SIZE, {"compat": "0.10"})
    assert refused(file, lambda each: each.add_bitmap("b", None, enabled=True)).kind is ErrorKind.UNSUPPORTED


def test_what_is_not_there_is_named() -> None:
    file = created(SIZE)
    done(file, lambda each: each.add_bitmap("b", None, enabled=True))
    edits: list[Edit] = [
        lambda each: each.remove_bitmap("c"),
        lambda each: each.enable_bitmap("c", enabled=True),
        lambda each: each.store_bitmap("c", ()),
    ]
    for edit in edits:
        error = refused(file, edit)
        assert (error.kind, error.remedy) == (ErrorKind.NOT_FOUND, "there are: b")
    with pytest.raises(ImageError, match="has no bitmap 'c'"):
        ranges(file, "c")


def inconsistent(how: str) -> MemoryFile:
    """An image with a bitmap that does not follow the disk: it says so, or a writer did not know it."""
    file = created(SIZE)
    done(file, lambda each: each.add_bitmap("b", None, enabled=True))
    if how == "in use":
        file.data[directory(file) + 15] |= 1
    else:
        file.data[95] = 0
    return file


@pytest.mark.parametrize("how", ["in use", "autoclear"])
def test_an_inconsistent_bitmap_can_only_be_removed(how: str) -> None:
    file = inconsistent(how)
    assert [each.consistent for each in reader_of(file).bitmaps()] == [False]
    edits: list[Edit] = [lambda each: each.enable_bitmap("b", enabled=False), lambda each: each.store_bitmap("b", ())]
    for edit in edits:
        error = refused(file, edit)
        assert error.kind is ErrorKind.CORRUPT
        assert error.remedy is not None
        assert "remove it" in error.remedy
    with pytest.raises(ImageError, match="inconsistent") as read:
        ranges(file, "b")
    assert read.value.kind is ErrorKind.CORRUPT
    done(file, lambda each: each.remove_bitmap("b"))
    assert reader_of(file).bitmaps() == []
    assert audit(bytes(file.data)).leaks == []


@pytest.mark.parametrize("how", ["in use", "autoclear"])
def test_a_new_bitmap_does_not_make_an_old_one_consistent(how: str) -> None:
    file = inconsistent(how)
    done(file, lambda each: each.add_bitmap("c", None, enabled=True))
    assert [(each.name, each.consistent) for each in reader_of(file).bitmaps()] == [("b", False), ("c", True)]
    done(file, lambda each: each.remove_bitmap("c"))
    assert [(each.name, each.consistent) for each in reader_of(file).bitmaps()] == [("b", False)]


def test_a_write_marks_an_enabled_bitmap_and_no_other() -> None:
    file = created(SIZE)
    done(file, lambda each: each.add_bitmap("on", None, enabled=True))
    done(file, lambda each: each.add_bitmap("off", None, enabled=False))
    done(file, lambda each: each.store_bitmap("off", [Range(0, 1)]))
    disk = opened(file)
    disk.write(200_000, b"x")
    disk.flush()
    assert [each.consistent for each in reader_of(file).bitmaps()] == [False, True]
    disk.end()
    assert [each.consistent for each in reader_of(file).bitmaps()] == [True, True]
    assert ranges(file, "on") == [Range(196_608, 65_536)]
    assert ranges(file, "off") == [Range(0, 65536)]
    assert audit(bytes(file.data)).leaks == []


def test_a_bitmap_that_cannot_be_read_is_marked_by_the_first_write() -> None:
    file = created(SIZE)
    done(file, lambda each: each.add_bitmap("b", None, enabled=True))
    table = int.from_bytes(file.data[directory(file) : directory(file) + 8], "big")
    file.data[table + 7] = 2  # a reserved bit
    disk = opened(file)
    disk.write(0, b"x")
    disk.end()
    assert [each.consistent for each in reader_of(file).bitmaps()] == [False]


def entry_of_another_program(file: MemoryFile) -> bytes:
    """Have the directory of an image with the one bitmap "b" say more than tapfs knows; the entry."""
    at = directory(file)
    table, entries, flags, kind, bits, _, _ = struct.unpack_from(">QIIBBHI", file.data, at)
    entry = struct.pack(">QIIBBHI", table, entries, flags | 4, kind, bits, 1, 11) + b"extra data." + b"b"
    file.data[at : at + len(entry)] = entry
    extension = bytes(file.data).index(EXTENSION.to_bytes(4, "big")) + 8
    file.data[extension + 8 : extension + 16] = (len(entry) + -len(entry) % 8).to_bytes(8, "big")
    return entry


def test_what_another_program_says_of_a_bitmap_stays() -> None:
    file = created(SIZE)
    done(file, lambda each: each.add_bitmap("b", None, enabled=True))
    entry = entry_of_another_program(file)
    done(file, lambda each: each.add_bitmap("c", None, enabled=True))
    assert entry in file.data[directory(file) : directory(file) + 64]
    assert [each.name for each in reader_of(file).bitmaps()] == ["b", "c"]


def with_extension(file: MemoryFile, content: bytes) -> None:
    """Put an unknown header extension before the end of the list."""
    at = struct.unpack_from(">I", file.data, 100)[0]
    while struct.unpack_from(">I", file.data, at)[0]:
        at += 8 + -(-struct.unpack_from(">I", file.data, at + 4)[0] // 8) * 8
    piece = struct.pack(">II", 0x12345678, len(content)) + content.ljust(-(-len(content) // 8) * 8, b"\0")
    file.data[at : at + len(piece) + 8] = piece + bytes(8)


def unknown(file: MemoryFile) -> list[bytes]:
    return [data for kind, data in Fields(bytes(file.data)).extensions() if kind == 0x12345678]


def test_the_extension_of_bitmaps_is_taken_from_the_middle_of_the_list() -> None:
    file = created(SIZE, {"cluster_size": "2048"})
    done(file, lambda each: each.add_bitmap("b", None, enabled=True))
    with_extension(file, b"kept")
    done(file, lambda each: each.remove_bitmap("b"))
    assert [kind for kind, _ in Fields(bytes(file.data)).extensions() if kind == EXTENSION] == []
    assert unknown(file) == [b"kept"]


def test_a_move_of_extensions_that_could_be_torn_is_refused() -> None:
    file = created(SIZE, {"cluster_size": "4096"})
    done(file, lambda each: each.add_bitmap("b", None, enabled=True))
    with_extension(file, b"." * 600)
    error = refused(file, lambda each: each.remove_bitmap("b"))
    assert error.kind is ErrorKind.UNSUPPORTED
    done(file, lambda each: each.add_bitmap("c", None, enabled=True))
    done(file, lambda each: each.remove_bitmap("b"))
    assert unknown(file) == [b"." * 600]


def test_two_extensions_of_bitmaps_are_refused() -> None:
    file = created(SIZE, {"cluster_size": "4096"})
    done(file, lambda each: each.add_bitmap("b", None, enabled=True))
    at = bytes(file.data).index(EXTENSION.to_bytes(4, "big"))
    file.data[at + 32 : at + 64] = file.data[at : at + 32]
    edits: list[Edit] = [
        lambda each: each.add_bitmap("c", None, enabled=True),
        lambda each: each.remove_bitmap("b"),
    ]
    for edit in edits:
        assert "two directories" in str(refused(file, edit))


def test_a_first_cluster_without_room_is_refused() -> None:
    file = created(SIZE, {"cluster_size": "512"})
    with_extension(file, b"." * 368)
    assert refused(file, lambda each: each.add_bitmap("b", None, enabled=True)).kind is ErrorKind.NO_SPACE


def test_the_name_of_the_parent_makes_room() -> None:
    name = "/images/" + "p" * 300
    file = created(SIZE, {"cluster_size": "2048"}, name)
    done(file, lambda each: each.add_bitmap("b", None, enabled=True))
    driver = driver_of(file)
    assert driver.backing is not None
    assert (driver.backing.name, driver.backing.format) == (name, "raw")
    assert [each.name for each in driver.bitmaps()] == ["b"]
    short = created(SIZE, {"cluster_size": "1024"}, "/images/" + "p" * 450)
    assert refused(short, lambda each: each.add_bitmap("b", None, enabled=True)).kind is ErrorKind.NO_SPACE


def test_no_data_is_written_over_bits() -> None:
    """A damaged entry that leads a write to a cluster of a bitmap is found by the guard."""
    file = created(SIZE, {"cluster_size": "4096"})
    disk = opened(file)
    disk.write(0, b"data")
    disk.flush()
    done(file, lambda each: each.add_bitmap("b", 512, enabled=False))
    done(file, lambda each: each.store_bitmap("b", [Range(0, 512)]))
    fields = Fields(bytes(file.data))
    table = fields.number(directory(file), 8)
    place = fields.number(table, 8)
    l2 = fields.number(fields.l1_at, 8) & 0x00FFFFFFFFFFFE00
    for target in (table, place):
        file.data[l2 : l2 + 8] = (target | 1 << 63).to_bytes(8, "big")
        with pytest.raises(ImageError, match="lies over the table or refcount block") as error:
            opened(file).write(0, b"x")
        assert error.value.kind is ErrorKind.CORRUPT


@pytest.mark.parametrize("seed", range(60))
def test_a_damaged_directory_gives_errors_and_no_damage(seed: int) -> None:
    choice = random.Random(seed)
    file, _ = make("plain", SIZE, 1)
    done(file, lambda each: each.add_bitmap("b", 4096, enabled=True))
    done(file, lambda each: each.store_bitmap("b", [Range(0, 5000)]))
    fields = Fields(bytes(file.data))
    table = fields.number(directory(file), 8)
    extension = bytes(file.data).index(EXTENSION.to_bytes(4, "big"))
    at = choice.choice([directory(file), table, extension])
    for _ in range(choice.choice([1, 1, 3])):
        file.data[at + choice.randrange(32)] = choice.choice([0, 1, 0xFF, choice.randrange(256)])
    before = FORMAT.open(file, OpenRequest(lenient=True)).check().corruptions
    edits: list[Edit] = [
        lambda each: each.add_bitmap("c", None, enabled=True),
        lambda each: each.remove_bitmap("b"),
        lambda each: each.enable_bitmap("b", enabled=False),
        lambda each: each.store_bitmap("b", [Range(0, SIZE)]),
    ]
    for edit in edits:
        left = MemoryFile(bytes(file.data))
        try:
            done(left, edit)
        except ImageError:
            continue
        assert driver_of(left).check().corruptions <= before
    try:
        for each in reader_of(file).bitmaps():
            list(reader_of(file).bitmap_ranges(each.name))
    except ImageError:
        pass
