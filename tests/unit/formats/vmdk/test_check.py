"""Checks of VMDKs: each kind of damage is named with its place, and repaired where nothing is lost by it."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

import pytest

from tapfs.driver import CheckReport, OpenRequest
from tapfs.errors import ImageError
from tapfs.formats.vmdk import FORMAT
from tapfs.testing.model import MemoryFile, read_extents
from tests.vmdk_images import ZERO, cowd, descriptor, monolithic, sectors, sesparse, stream

MIB = 1 << 20
GRAIN = 16 * 512
NOISE = random.Random(1).randbytes(GRAIN)
GRAINS = {0: NOISE, 1: NOISE, 5: NOISE, 600: NOISE}
SIZE = 8 * MIB


def opened(file: MemoryFile):  # noqa: ANN201  see FORMAT
    return FORMAT.open(file, OpenRequest(lenient=True, further=file))


def checked(content: bytes) -> CheckReport:
    return opened(MemoryFile(content)).check()


def words(content: bytes, *places: int) -> list[int]:
    return [struct.unpack_from("<I", content, place)[0] for place in places]


def tables(content: bytes, *, redundant: bool = False) -> int:
    """The host offset of the directory."""
    return int(struct.unpack_from("<Q", content, 48 if redundant else 56)[0]) * 512


def test_a_good_image_has_no_findings() -> None:
    for content in (
        monolithic(GRAINS, SIZE),
        monolithic({0: ZERO}, SIZE),
        monolithic(GRAINS, SIZE, all_tables=False),
        stream(GRAINS, SIZE),
        stream(GRAINS, SIZE, footer=False),
        stream(GRAINS, SIZE, footer=False, markers=False),
    ):
        report = checked(content)
        assert report.findings == []


def test_a_file_that_was_cut_inside_a_grain() -> None:
    """All that the disk has of a grain must be there; what the last grain has behind the disk need not."""
    size = 2 * GRAIN + 512
    content = monolithic({0: NOISE, 2: NOISE}, size)
    whole = content[: len(content) - GRAIN + 512]
    assert checked(whole).findings == []
    driver = opened(MemoryFile(whole))
    assert read_extents(driver, MemoryFile(whole), 2 * GRAIN, 512) == NOISE[:512]

    report = checked(whole[:-1])
    assert [finding.message.partition(": ")[2] for finding in report.findings] == [
        f"the file was cut: it ends 1 bytes before the grain at {len(whole) - 512:#x} does"
    ]
    with pytest.raises(ImageError, match="the file was cut") as raised:
        opened(MemoryFile(whole[:-1])).map(0, size)
    assert raised.value.offset == report.findings[0].host_offset


def damaged(change: Callable[[bytearray, int, int], None], **keys: object) -> tuple[CheckReport, MemoryFile]:
    content = bytearray(monolithic(GRAINS, SIZE, **keys))
    directory = tables(content)
    change(content, directory, words(content, directory)[0] * 512)
    file = MemoryFile(bytes(content))
    return opened(file).check(), file


def put(content: bytearray, at: int, word: int) -> None:
    struct.pack_into("<I", content, at, word)


def at_entry(number: int, word: int) -> Callable[[bytearray, int, int], None]:
    return lambda content, _, table: put(content, table + 4 * number, word)


def at_directory(number: int, word: int) -> Callable[[bytearray, int, int], None]:
    return lambda content, directory, _: put(content, directory + 4 * number, word)


def same_grain(content: bytearray, directory: int, table: int) -> None:
    del directory
    put(content, table + 8, words(content, table)[0])


def grain_on_table(content: bytearray, directory: int, table: int) -> None:
    del directory
    put(content, table + 8, table // 512)


def same_table(content: bytearray, directory: int, table: int) -> None:
    put(content, directory + 4, table // 512)


CASES: dict[str, tuple[Callable[[bytearray, int, int], None], str]] = {
    "an entry past the end": (at_entry(5, 1 << 30), "entry 5 of grain table 0: grain at 0x80"),
    "an entry in the header": (at_entry(9, 1), "entry 9 of grain table 0: grain at 0x200 inside"),
    "two entries on one grain": (same_grain, "of grain table 0 on overlap the grains from entry"),
    "an entry on a table": (grain_on_table, "overlap"),
    "a directory entry past the end": (at_directory(0, 1 << 30), "directory entry 0: grain table"),
    "a directory entry of 0": (at_directory(0, 0), "directory entry 0 is 0, and its twin is not"),
    "two directory entries on one table": (same_table, "overlaps"),
    "twins that differ": (at_entry(1, 0), "grain table 0 and its redundant twin differ from entry 1"),
}


@pytest.mark.parametrize("case", CASES)
def test_damage_is_named(case: str) -> None:
    report, file = damaged(CASES[case][0])
    assert report.corruptions > 0
    assert any(CASES[case][1] in finding.message for finding in report.findings), report.findings
    assert all(finding.host_offset is not None and finding.host_offset < file.size() for finding in report.findings)


def test_twins_may_differ_in_an_extent_that_was_not_closed() -> None:
    report, file = damaged(CASES["twins that differ"][0], unclean=1)
    assert report.corruptions == 0
    assert any("differ" in finding.message for finding in report.findings)
    file.apply_all(list(opened(file).repair()))
    again = opened(file).check()
    assert [finding.message for finding in again.findings if "leak" not in str(finding.severity)] == []


def lost_sector(content: bytearray, directory: int, table: int) -> None:
    del directory
    content[table : table + 512] = bytes(512)


CASES["a sector of a table"] = (lost_sector, "grain table 0 and its redundant twin differ from entry 0")


@pytest.mark.parametrize(
    "case",
    [
        "a directory entry past the end",
        "a directory entry of 0",
        "an entry past the end",
        "twins that differ",
        "a sector of a table",
    ],
)
def test_what_the_twin_has_is_repaired_from_it(case: str) -> None:
    report, file = damaged(CASES[case][0])
    expected = read_extents(opened(MemoryFile(monolithic(GRAINS, SIZE))), MemoryFile(monolithic(GRAINS, SIZE)), 0, SIZE)
    plans = list(opened(file).repair())
    assert all(plan.mends for plan in plans)
    file.apply_all(plans)
    driver = opened(file)
    assert driver.check().findings == []
    assert report.corruptions > 0
    assert driver.repair() == []
    assert read_extents(driver, file, 0, SIZE) == expected


def test_entries_that_only_the_twin_has_are_left_where_they_would_overlap() -> None:
    def stale(content: bytearray, directory: int, table: int) -> None:
        del directory
        twin = words(content, tables(content, redundant=True))[0] * 512
        put(content, twin + 4, words(content, table)[0])
        put(content, table + 4, 0)

    report, file = damaged(stale)
    assert any("overlap" in finding.message for finding in report.findings)
    assert opened(file).repair() == []


def test_a_blank_primary_directory_is_repaired_from_the_redundant_one() -> None:
    def blank(content: bytearray, directory: int, table: int) -> None:
        content[directory : directory + 512] = bytes(512)
        del table

    report, file = damaged(blank)
    assert report.corruptions > 0
    file.apply_all(list(opened(file).repair()))
    assert opened(file).check().findings == []


def test_without_twins_nothing_is_guessed() -> None:
    report, file = damaged(CASES["an entry past the end"][0], redundant=False)
    assert report.corruptions == 1
    assert opened(file).repair() == []


def test_leaks_hold_data() -> None:
    content = monolithic(GRAINS, SIZE)
    file = MemoryFile(content + bytes(-len(content) % GRAIN) + bytes(GRAIN) + b"leak" * 10)
    report = opened(file).check()
    assert (report.corruptions, report.leaks) == (0, 1)
    file.apply_all(list(opened(file).repair()))
    assert opened(file).check().leaks == 0


def test_a_lost_footer_is_written_again() -> None:
    content = stream(GRAINS, SIZE)
    file = MemoryFile(content[: -3 * 512])
    assert any("the footer is lost" in finding.message for finding in opened(file).check().findings)
    file.apply_all(list(opened(file).repair()))
    assert bytes(file.data)[-512:] == content[-512:]
    assert opened(file).check().findings == []


@pytest.mark.parametrize(
    ("at", "value", "says"),
    [
        (0, b"\xff", "is marked as sector 255, not 0"),
        (8, b"\xff\xff\xff", "packed bytes, which cannot be"),
        (8, bytes(4), "has 0 packed"),
    ],
)
def test_markers_of_packed_grains(at: int, value: bytes, says: str) -> None:
    content = bytearray(stream(GRAINS, SIZE))
    content[65536 + at : 65536 + at + len(value)] = value
    report = checked(bytes(content))
    assert report.corruptions > 0
    assert any(says in finding.message for finding in report.findings)


def test_a_cowd_whose_next_grain_would_overwrite_others() -> None:
    content = bytearray(cowd({0: b"x", 1: b"y"}, MIB))
    content[28:32] = (5).to_bytes(4, "little")
    file = MemoryFile(descriptor([f'RW {sectors(MIB)} VMFSSPARSE "c"']), "d", {"c": MemoryFile(bytes(content), "c")})
    report = opened(file).check()
    assert report.corruptions == 1
    assert report.findings[0].message.startswith("c: the next grain would go to 0xa00, among the grains")


def test_a_sesparse_with_two_entries_on_one_grain() -> None:
    content = bytearray(sesparse({0: b"x", 1: b"y"}, MIB))
    table = 21 * 512
    content[table + 8 : table + 16] = content[table : table + 8]
    file = MemoryFile(descriptor([f'RW {sectors(MIB)} SESPARSE "e"']), "d", {"e": MemoryFile(bytes(content), "e")})
    report = opened(file).check()
    assert report.corruptions == 1
    assert "overlap" in report.findings[0].message


def test_a_truncated_flat_extent_is_a_finding() -> None:
    file = MemoryFile(descriptor(['RW 8 FLAT "f"']), "d", {"f": MemoryFile(b"f" * 100, "f")})
    report = opened(file).check()
    assert report.corruptions == 1
    assert "is truncated" in report.findings[0].message
