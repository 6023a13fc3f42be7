"""The edits of qcow2 snapshots: what they refuse before they change anything, and what they keep."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator

import pytest

from tapfs import ErrorKind, ImageError
from tapfs.driver import CreateRequest, Driver, OpenRequest, SnapshotRecord
from tapfs.formats.qcow2 import FORMAT
from tapfs.formats.qcow2.editable import EditableQcow2Driver
from tapfs.kernel.references import use_engine
from tapfs.plan import Plan
from tapfs.references import use_counter
from tapfs.testing.model import MemoryFile, read_extents
from tests.qcow2_edits import Edit, done, driver_of, refused
from tests.qcow2_images import Fields, audit, by_hand, created, make, opened

SIZE = 300_000 // 512 * 512


def records(file: MemoryFile) -> list[SnapshotRecord]:
    return list(FORMAT.open(file, OpenRequest()).snapshot_records())


def written(file: MemoryFile, seed: int, offset: int = 0, length: int = 50_000, backing: bytes = b"") -> bytes:
    """Write into an image; the whole disk afterwards."""
    disk = opened(file, backing)
    disk.write(offset, random.Random(seed).randbytes(length))
    disk.flush()
    return by_hand(bytes(file.data), backing)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("one", ErrorKind.EXISTS),
        ("1", ErrorKind.EXISTS),
        ("", ErrorKind.INVALID_ARGUMENT),
        ("x" * 256, ErrorKind.INVALID_ARGUMENT),
        ("a\0b", ErrorKind.INVALID_ARGUMENT),
    ],
)
def test_a_name_that_cannot_be_is_refused(name: str, kind: ErrorKind) -> None:
    file = created(SIZE)
    done(file, lambda each: each.create_snapshot("one", 5))
    assert refused(file, lambda each: each.create_snapshot(name, 5)).kind is kind


def test_ids_go_on_from_the_largest() -> None:
    file = created(SIZE)
    for name in ("a", "b", "c"):
        done(file, lambda each, name=name: each.create_snapshot(name, 7))
    done(file, lambda each: each.delete_snapshot("b"))
    done(file, lambda each: each.create_snapshot("d", 9))
    assert [(each.id, each.name, each.seconds) for each in records(file)] == [
        ("1", "a", 7),
        ("3", "c", 7),
        ("4", "d", 9),
    ]


def test_counts_that_are_too_narrow_are_refused_before_any_change() -> None:
    file, _ = make("refcounts of 1 bit", SIZE, 1)
    error = refused(file, lambda each: each.create_snapshot("one", 5))
    assert error.kind is ErrorKind.OUT_OF_BOUNDS
    assert "refcounts of 1 bit cannot count another reference" in str(error)
    empty = created(SIZE, {"refcount_bits": "1", "cluster_size": "1024"})
    done(empty, lambda each: each.create_snapshot("nothing is shared", 5))
    assert audit(bytes(empty.data)).corruptions == []


def test_two_bits_count_to_three() -> None:
    file = created(SIZE, {"refcount_bits": "2", "cluster_size": "4096"})
    written(file, 1)
    done(file, lambda each: each.create_snapshot("one", 5))
    done(file, lambda each: each.create_snapshot("two", 5))
    assert refused(file, lambda each: each.create_snapshot("three", 5)).kind is ErrorKind.OUT_OF_BOUNDS
    done(file, lambda each: each.delete_snapshot("one"))
    done(file, lambda each: each.create_snapshot("three", 5))
    assert audit(bytes(file.data)).corruptions == []


def test_a_data_file_has_no_snapshots() -> None:
    outside = MemoryFile(b"", "outside")
    file = MemoryFile(further={"outside": outside})
    file.apply(FORMAT.create(CreateRequest(SIZE, None, options={"data_file": "outside"})))
    driver = FORMAT.open(file, OpenRequest(writable=True, further=file))
    assert isinstance(driver, EditableQcow2Driver)
    for edit in (driver.create_snapshot("one", 5), driver.apply_snapshot("one"), driver.delete_snapshot("one")):
        with pytest.raises(ImageError, match="another file") as error:
            next(edit)
        assert error.value.kind is ErrorKind.UNSUPPORTED


def test_a_name_that_means_two_snapshots_must_be_told_apart() -> None:
    """QEMU allows a name that is the id of another snapshot, and one name twice."""
    file = created(SIZE)
    for name in ("a", "b", "c"):
        done(file, lambda each, name=name: each.create_snapshot(name, 7))
    at = bytes(file.data).rindex(b"1a")
    file.data[at + 1 : at + 2] = b"3"
    error = refused(file, lambda each: each.delete_snapshot("3"))
    assert error.kind is ErrorKind.INVALID_ARGUMENT
    assert error.remedy is not None
    assert "snapshot.id=1" in error.remedy
    done(file, lambda each: each.delete_snapshot("snapshot.name=3"))
    assert [each.name for each in records(file)] == ["b", "c"]
    done(file, lambda each: each.delete_snapshot("snapshot.id=2,snapshot.name=b"))
    assert [each.name for each in records(file)] == ["c"]
    assert refused(file, lambda each: each.apply_snapshot("snapshot.id=3,snapshot.name=b")).kind is ErrorKind.NOT_FOUND
    assert refused(file, lambda each: each.apply_snapshot("snapshot.what=3")).kind is ErrorKind.NOT_FOUND


def foreign(file: MemoryFile, size: int, extra: bytes) -> None:
    """Have the one snapshot of an image say that its disk had another size, a VM's state, and extra data."""
    fields = Fields(bytes(file.data))
    at = fields.snapshots_at
    l1_at, l1_entries, _, _, seconds, nanoseconds, _, _, length = struct.unpack_from(">QIHHIIQII", file.data, at)
    del length
    entry = struct.pack(">QIHHIIQII", l1_at, l1_entries, 1, 3, seconds, nanoseconds, 12345, 777, 16 + len(extra))
    entry += struct.pack(">QQ", 777, size) + extra + b"1one"
    file.data[at : at + len(entry)] = entry


def test_what_another_program_has_said_of_a_snapshot_stays() -> None:
    file = created(SIZE)
    written(file, 1)
    done(file, lambda each: each.create_snapshot("one", 5))
    foreign(file, SIZE, b"instrctssomething that nobody knows")
    before = records(file)
    done(file, lambda each: each.create_snapshot("two", 5))
    assert records(file)[:1] == before
    assert (before[0].state_bytes, before[0].clock_nanoseconds) == (777, 12345)
    assert b"instrctssomething that nobody knows1one" in file.data


@pytest.mark.parametrize("size", [SIZE // 2 // 512 * 512, SIZE + (8 << 20)])
def test_a_snapshot_of_a_disk_of_another_size_gives_the_disk_that_size(size: int) -> None:
    """What QEMU's case 261 looks at, too: an entry without a size means the size of the current disk."""
    file = created(size, {"cluster_size": "512"})
    then = written(file, 1)
    done(file, lambda each: each.create_snapshot("one", 5))
    # Another size, as a resize of the current disk gives it.
    driver = driver_of(file)
    needed = -(-SIZE // driver.header.table_span)
    entries = max(needed, len(driver.l1))
    place = len(file.data) + -len(file.data) % 512
    file.data.extend(
        bytes(place - len(file.data)) + bytes(driver.l1.raw).ljust(8 * entries + -8 * entries % 512, b"\0")
    )
    file.data[24:32] = SIZE.to_bytes(8, "big")
    file.data[36:40] = entries.to_bytes(4, "big")
    file.data[40:48] = place.to_bytes(8, "big")
    file.apply_all(list(FORMAT.open(file, OpenRequest(lenient=True)).repair()))
    now = written(file, 2)
    done(file, lambda each: each.create_snapshot("two", 5))
    done(file, lambda each: each.apply_snapshot("one"))
    assert by_hand(bytes(file.data)) == then
    assert [each.virtual_size for each in records(file)] == [size, SIZE]
    assert by_hand(bytes(file.data), snapshot=1) == now
    assert audit(bytes(file.data)).corruptions == []
    done(file, lambda each: each.apply_snapshot("two"))
    assert by_hand(bytes(file.data)) == now


def test_an_entry_without_sizes_gets_them_by_a_repair_and_then_by_every_edit() -> None:
    file = created(SIZE)
    written(file, 1)
    done(file, lambda each: each.create_snapshot("one", 5))
    fields = Fields(bytes(file.data))
    at = fields.snapshots_at
    # The entry of "one" without extra data, and one of a smaller disk behind it.
    l1_at, l1_entries = struct.unpack_from(">QI", file.data, at)
    short = struct.pack(">QIHHIIQII", l1_at, l1_entries, 1, 3, 5, 0, 0, 0, 0) + b"1one"
    file.data[at : at + 64] = short.ljust(64, b"\0")
    assert "does not say the size of its disk" in str(refused(file, lambda each: each.create_snapshot("two", 5)))
    file.apply_all(list(FORMAT.open(file, OpenRequest(lenient=True)).repair()))
    done(file, lambda each: each.create_snapshot("two", 5))
    assert [each.virtual_size for each in records(file)] == [SIZE, SIZE]


def test_version_2_keeps_the_size_of_its_disk() -> None:
    file = created(SIZE, {"compat": "0.10"})
    done(file, lambda each: each.create_snapshot("one", 5))
    foreign(file, SIZE - 512, b"")
    assert refused(file, lambda each: each.apply_snapshot("one")).kind is ErrorKind.UNSUPPORTED


def test_an_image_whose_counts_are_too_low_stays_as_it_is() -> None:
    file, _ = make("snapshot", SIZE, 1)
    fields = Fields(bytes(file.data))
    block = fields.number(fields.reftable_at, 8)
    last = next(at for at in range(block + fields.cluster - 2, block, -2) if fields.number(at, 2))
    file.data[last : last + 2] = bytes(2)
    edits: list[Edit] = [
        lambda each: each.create_snapshot("new", 5),
        lambda each: each.apply_snapshot("before"),
        lambda each: each.delete_snapshot("before"),
    ]
    for edit in edits:
        error = refused(file, edit)
        assert error.kind is ErrorKind.CORRUPT
        assert error.remedy is not None
        assert "tapfs repair" in error.remedy


def test_unknown_autoclear_features_are_cleared_by_an_edit() -> None:
    file = created(SIZE)
    file.data[88:96] = (1 << 63 | 4).to_bytes(8, "big")
    done(file, lambda each: each.create_snapshot("one", 5))
    assert Fields(bytes(file.data)).autoclear == 0


def test_leaks_are_no_reason_to_refuse() -> None:
    file, _ = make("snapshot", SIZE, 1)
    fields = Fields(bytes(file.data))
    block = fields.number(fields.reftable_at, 8)
    file.data.extend(bytes(fields.cluster))
    at = block + 2 * (len(file.data) // fields.cluster - 1)
    file.data[at : at + 2] = b"\0\1"
    done(file, lambda each: each.create_snapshot("new", 5))
    assert audit(bytes(file.data)).corruptions == []


@pytest.mark.parametrize("kind", ["plain", "small clusters", "compressed", "subclusters", "overlay"])
def test_the_map_of_a_snapshot_stays_right_while_the_disk_is_written(kind: str) -> None:
    """Both are open at once: a cluster that they share is never written in place."""
    file, backing = make(kind, SIZE, 3)
    done(file, lambda each: each.create_snapshot("one", 5))
    then = by_hand(bytes(file.data), backing)
    snapshot: Driver = FORMAT.open(file, OpenRequest(snapshot="one"))
    early = snapshot.map(0, SIZE)
    disk = opened(file, backing)
    choice = random.Random(4)
    for number in range(30):
        disk.write(choice.randrange(SIZE - 9000), choice.randbytes(choice.choice([100, 9000])))
        if number % 10 == 9:
            disk.flush()
        assert read_extents(snapshot, file, 0, SIZE, backing) == then
    assert snapshot.map(0, SIZE) == early


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_table_of_snapshots_gives_errors_and_no_damage(seed: int) -> None:
    choice = random.Random(seed)
    file, backing = make("snapshot", SIZE, 1)
    current = by_hand(bytes(file.data), backing)
    at = Fields(bytes(file.data)).snapshots_at
    for _ in range(choice.choice([1, 1, 3])):
        file.data[at + choice.randrange(64)] = choice.choice([0, 1, 0xFF, choice.randrange(256)])
    edits: list[Edit] = [
        lambda each: each.create_snapshot("new", 5),
        lambda each: each.apply_snapshot("snapshot.id=1"),
        lambda each: each.delete_snapshot("snapshot.id=1"),
    ]
    for edit in edits:
        left = MemoryFile(bytes(file.data))
        try:
            done(left, edit)
        except ImageError:
            continue
        assert audit(bytes(left.data)).corruptions == []
        if edit is not edits[1]:
            assert by_hand(bytes(left.data), backing) == current


@pytest.mark.parametrize("kind", ["snapshot", "compressed", "subclusters over a parent", "refcounts of 64 bits"])
def test_the_engine_edits_as_python_does(kind: str) -> None:
    contents: list[list[bytes]] = []
    try:
        for begin in (lambda: use_counter(None), use_engine):
            begin()
            file, _ = make(kind, SIZE, 4)
            contents.append([])
            for edit in (create_two, apply_two, delete_two):
                done(file, edit)
                contents[-1].append(bytes(file.data))
    finally:
        use_engine()
    assert contents[0] == contents[1]
    assert audit(contents[0][-1]).corruptions == []


def create_two(driver: EditableQcow2Driver) -> Iterator[Plan]:
    yield from driver.create_snapshot("two", 5)


def apply_two(driver: EditableQcow2Driver) -> Iterator[Plan]:
    yield from driver.apply_snapshot("two")


def delete_two(driver: EditableQcow2Driver) -> Iterator[Plan]:
    yield from driver.delete_snapshot("two")
