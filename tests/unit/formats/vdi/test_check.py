"""Check and repair of VDI images: what is found, what is mended, and what is left alone."""

from __future__ import annotations

import uuid

import pytest

from tapfs.driver import CheckReport, OpenRequest
from tapfs.formats.vdi import FORMAT
from tapfs.testing.model import MemoryFile, read_extents
from tests.vdi_images import FREE, MIB, ZERO, VdiImage

BLOCKS = {0: b"a" * MIB, 1: b"b" * MIB, 2: b"c" * MIB}


def checked(image: VdiImage, cut: int = 0) -> tuple[CheckReport, MemoryFile]:
    content = image.content()
    file = MemoryFile(content[: len(content) - cut])
    return FORMAT.open(file, OpenRequest(lenient=True)).check(), file


def repaired(file: MemoryFile) -> list[str]:
    plans = list(FORMAT.open(file, OpenRequest(lenient=True)).repair())
    file.apply_all(plans)
    return [plan.mends for plan in plans]


def messages(report: CheckReport) -> str:
    return "\n".join(finding.message for finding in report.findings)


def test_a_good_image_has_no_findings() -> None:
    report, file = checked(VdiImage(4 * MIB, [2, ZERO, 0, 1], BLOCKS))
    assert report.findings == []
    assert report.allocated_bytes == 3 * MIB
    assert repaired(file) == []


def test_two_entries_with_one_place_are_found_and_left_alone() -> None:
    report, file = checked(VdiImage(4 * MIB, [0, 1, 2, 1], BLOCKS, allocated=3))
    assert report.corruptions == 1
    assert "block 3 overlaps a run of 3 blocks from block 0 on" in messages(report)
    assert repaired(file) == []


def test_an_entry_past_the_end_of_the_file_is_found_and_left_alone() -> None:
    report, file = checked(VdiImage(4 * MIB, [0, 1, 9, FREE], BLOCKS, allocated=10))
    assert report.corruptions == 1
    assert report.findings[0].host_offset == MIB + 8
    assert repaired(file) == []
    cut, _ = checked(VdiImage(3 * MIB, [0, 1, 2], BLOCKS), cut=1)
    assert cut.corruptions == 1


def test_a_count_that_is_behind_the_map_is_a_corruption_and_mended() -> None:
    image = VdiImage(3 * MIB, [0, 1, 2], BLOCKS, allocated=2)
    report, file = checked(image)
    assert report.corruptions == 1
    assert "would give its place away again" in messages(report)
    assert repaired(file) == ["the header counted 2 blocks instead of 3"]
    driver = FORMAT.open(file, OpenRequest())
    assert driver.check().findings == []
    assert read_extents(driver, file, 0, 3 * MIB) == image.guest()


def test_a_count_that_is_ahead_and_space_that_nothing_names_are_given_back() -> None:
    report, file = checked(VdiImage(3 * MIB, [0, FREE, FREE], BLOCKS, allocated=3))
    assert (report.corruptions, report.leaked_bytes) == (0, 2 * MIB)
    assert "counts 3 blocks, and 1 are used" in messages(report)
    assert repaired(file) == ["the header counted 3 blocks instead of 1", f"leaked space of {2 * MIB} bytes"]
    after = FORMAT.open(file, OpenRequest()).check()
    assert after.findings == []


def test_a_place_between_blocks_that_is_not_used_is_noted() -> None:
    report, _ = checked(VdiImage(3 * MIB, [0, FREE, 2], {0: b"a" * MIB, 2: b"c" * MIB}, allocated=3))
    assert (report.corruptions, report.leaks) == (0, 0)
    assert "1 places between blocks are not used" in messages(report)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (VdiImage(MIB, [FREE], creation=uuid.UUID(int=0)), "VirtualBox does not open it"),
        (VdiImage(MIB, [FREE], link=uuid.UUID(int=4)), "by its type (dynamic) it has none"),
        (VdiImage(MIB, [FREE, FREE]), "2 entries for the 1 blocks of the disk"),
    ],
)
def test_what_other_programs_trip_over_is_noted(image: VdiImage, message: str) -> None:
    report, file = checked(image)
    assert (report.corruptions, report.leaks) == (0, 0)
    assert message in messages(report)
    assert repaired(file) == []


def test_data_behind_the_end_of_the_disk_is_not_given_back() -> None:
    """The size of the disk may be what is wrong: a repair must not give these blocks back."""
    report, file = checked(VdiImage(MIB, [0, FREE, 2, 1], BLOCKS, allocated=3))
    assert (report.corruptions, report.leaks) == (0, 1)
    assert "4 entries for the 1 blocks of the disk" in messages(report)
    assert "2 blocks behind the end of the disk have places" in messages(report)
    assert "the header counts" not in messages(report)
    assert repaired(file) == []
