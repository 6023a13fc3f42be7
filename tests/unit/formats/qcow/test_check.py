"""Check finds the damage of images, and stays bounded."""

from __future__ import annotations

import random
import struct
from collections import Counter
from typing import Literal

import pytest

from tapfs.driver import OpenRequest, Scratch, Severity
from tapfs.formats import claims
from tapfs.formats.claims import Claim, gaps
from tapfs.formats.qcow import FORMAT, survey
from tapfs.formats.qcow.check import Check, Claimant
from tapfs.formats.qcow.reader import QcowReader
from tapfs.testing.model import MemoryFile
from tests.qcow_images import created, make, opened

MIB = 1 << 20


def image() -> MemoryFile:
    disk = opened(created(8 * MIB))
    for index in range(4):
        disk.write(index * 2 * MIB, b"data" * 4096)
    disk.flush()
    return MemoryFile(bytes(disk.file.data))


def put(file: MemoryFile, offset: int, value: int) -> None:
    file.data[offset : offset + 8] = value.to_bytes(8, "big")


def entry(file: MemoryFile, offset: int) -> int:
    return int.from_bytes(file.data[offset : offset + 8], "big")


def corruptions(file: MemoryFile) -> list[str]:
    report = FORMAT.open(file, OpenRequest(lenient=True)).check()
    found = [finding.message for finding in report.findings if finding.severity is Severity.CORRUPTION]
    assert len(found) == report.corruptions
    return found


def test_a_whole_image_is_clean_and_its_space_is_counted() -> None:
    report = FORMAT.open(image(), OpenRequest()).check()
    assert (report.corruptions, report.leaks, report.leaked_bytes) == (0, 0, 0)
    assert report.allocated_bytes == 4 * 16384


def test_nothing_is_said_about_who_wrote_an_image() -> None:
    """The plain layout is everybody's: an image that tapfs made was once "written by QEMU"."""
    assert FORMAT.open(image(), OpenRequest()).check().findings == []
    assert FORMAT.open(image(), OpenRequest()).details()["era"] is None
    blktap = created(8 * MIB, {"blktap": "on"})
    (note,) = FORMAT.open(blktap, OpenRequest()).check().findings
    assert note.message == "the layout is that of blktap, 2010-05 to 2014"


def test_two_entries_for_one_cluster() -> None:
    file = image()
    table = entry(file, 48)
    put(file, table + 8, entry(file, table))
    assert any("overlap" in message for message in corruptions(file))


def test_two_l1_entries_for_one_table() -> None:
    file = image()
    put(file, 56, entry(file, 48))
    assert corruptions(file) == ["L2 table 1 overlaps L2 table 0"]


def test_a_cluster_over_a_table() -> None:
    file = image()
    put(file, entry(file, 48) + 80, entry(file, 56))
    assert len(corruptions(file)) == 1


def test_an_l1_entry_past_the_end() -> None:
    file = image()
    put(file, 56, 1 << 40)
    assert any("past the end" in message for message in corruptions(file))


def test_a_fast_path_that_disagrees_with_l2() -> None:
    file, _ = make("blktap", 4 * MIB, 0)
    table = max(entry(file, 4096), entry(file, 4104))
    put(file, table + 800, 0)
    assert len(corruptions(file)) == 1
    # Which of both readings is right nobody can know: nothing is repaired or given back.
    assert not FORMAT.open(file, OpenRequest(lenient=True)).repair()


def test_leaks_are_data_and_are_given_back() -> None:
    file = image()
    file.data.extend(bytes(8192) + b"leak" * 1024 + bytes(8192) + b"more" * 100)
    report = FORMAT.open(file, OpenRequest()).check()
    assert (report.corruptions, report.leaks) == (0, 2)
    assert report.leaked_bytes == 4096 + 400
    file.apply_all(list(FORMAT.open(file, OpenRequest(lenient=True)).repair()))
    assert FORMAT.open(file, OpenRequest()).check().leaks == 0


def test_a_stray_header_is_noted_and_rebuilt() -> None:
    file, _ = make("blktap-stray", 6 * MIB, 0)
    before = FORMAT.open(file, OpenRequest())
    findings = before.check().findings
    assert any("stray copy of the header" in finding.message for finding in findings)
    extents = before.map(0, 6 * MIB)
    file.apply_all(list(FORMAT.open(file, OpenRequest(lenient=True)).repair()))
    after = FORMAT.open(file, OpenRequest())
    assert after.map(0, 6 * MIB) == extents
    assert after.fast_path
    assert not any("stray" in finding.message for finding in after.check().findings)


@pytest.mark.parametrize("length", [20, 440, 449, 1023])
def test_a_name_at_60_moves_out_of_the_flags(length: int) -> None:
    file, _ = make("overlay-12byte-little", 4 * MIB, 0)
    name = (b"/" + b"n" * length)[:length]
    file.data[60 : 60 + length] = name
    file.data[16:20] = length.to_bytes(4, "big")
    file.apply_all(list(FORMAT.open(file, OpenRequest(lenient=True)).repair()))
    driver = FORMAT.open(file, OpenRequest())
    assert driver.geometry.backing is not None
    assert driver.geometry.backing.name == name.decode()
    assert driver.extended is not None
    assert driver.extended.flags == 3
    assert driver.cksum_valid
    report = driver.check()
    assert (report.corruptions, report.leaks) == (0, 0)
    assert not driver.repair()


def test_findings_and_memory_are_bounded() -> None:
    file = image()
    table = entry(file, 48)
    for at in range(512):
        put(file, table + 8 * at, (1 << 41) + 8192 * at)
    report = FORMAT.open(file, OpenRequest(lenient=True)).check()
    assert report.corruptions == 512
    assert len([finding for finding in report.findings if finding.severity is Severity.CORRUPTION]) == 100


def test_gaps_of_more_claims_than_are_held_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = random.Random(3)
    made = [
        Claim(choice.randrange(40_000), choice.choice([1, 7, 40]), Claimant.CLUSTER, number, number % 8)
        for number in range(700)
    ]
    made += [Claim(777, 5, Claimant.TABLE, number) for number in range(80)]

    def run() -> tuple[list[tuple[int, int]], list[tuple[Claim, Claim]]]:
        overlaps: list[tuple[Claim, Claim]] = []
        # An iterator: whoever went over the claims a second time would find none.
        found = list(gaps(iter(made), 40_100, lambda *pair: overlaps.append(pair)))
        return found, overlaps

    whole = run()
    bytes_ = bytearray(40_100)
    for claim in made:
        bytes_[claim.start : claim.end] = b"x" * claim.length
    assert sum(length for _, length in whole[0]) == bytes_.count(0)
    assert len(whole[1]) > 80
    for held in (1, 64, 779, 780):
        monkeypatch.setattr(claims, "MAX_HELD", held)
        assert run() == whole


def test_claims_are_kept_whole() -> None:
    largest = Claim((1 << 64) - 1, (1 << 64) - 1, Claimant.CLUSTER, (1 << 24) - 1, 8191)
    for claim in (largest, Claim(0, 0, Claimant.HEADER), Claim(1 << 40, 512, Claimant.TABLE, 7)):
        assert claims.unpack(claim.pack()) == claim


class CountingFile(MemoryFile):
    """A host file that counts the reads of each offset."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.reads: Counter[int] = Counter()

    def read(self, offset: int, length: int) -> bytes:
        self.reads[offset] += 1
        return super().read(offset, length)


def hostile(tables: int) -> CountingFile:
    """An image of clusters and tables of 512 bytes, whose L1 table names each of the tables in any order."""
    data = bytearray(
        struct.pack(">4sIQIIQBB2xIQ", b"QFI\xfb", 1, 0, 0, 0, tables << 15, 9, 6, 0, 512).ljust(512, b"\0")
    )
    first = (512 + 8 * tables + 511) // 512 * 512
    order = list(range(tables))
    random.Random(4).shuffle(order)
    data += b"".join((first + 512 * number).to_bytes(8, "big") for number in order)
    return CountingFile(bytes(data.ljust(first + 512 * tables, b"\0")))


def test_a_check_reads_each_table_once_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass for each `MAX_HELD` claims would make the time quadratic."""
    tables, held = 3000, 50
    monkeypatch.setattr(claims, "MAX_HELD", held)
    monkeypatch.setattr(survey, "MAX_CLUSTERS", 0)  # its marks would do without all this
    file = hostile(tables)
    made: list[claims.MemoryScratch] = []
    kept: list[int] = []

    class Watched(claims.MemoryScratch):
        def append(self, data: bytes) -> None:
            kept.append(len(data))
            super().append(data)

    def scratch() -> Scratch:
        made.append(Watched())
        return made[-1]

    driver = FORMAT.open(file, OpenRequest(lenient=True, scratch=scratch))
    file.reads.clear()
    report = driver.check()
    assert (report.corruptions, report.leaks) == (0, 0)
    first = (512 + 8 * tables + 511) // 512 * 512
    assert [file.reads[first + 512 * number] for number in range(tables)] == [1] * tables
    # Once for the places of the tables, once for all claims.
    assert len(made) == 2
    assert len(kept) == 2 * tables // held
    assert len(set(kept)) == 1


@pytest.mark.parametrize("damaged", [False, True])
def test_progress_ends_at_the_end(*, damaged: bool) -> None:
    calls: list[tuple[int, int]] = []
    file = image()
    if damaged:
        l1 = entry(file, 40)
        put(file, entry(file, l1 + 8), entry(file, entry(file, l1)))
    report = FORMAT.open(file, OpenRequest()).check(lambda done, total: calls.append((done, total)))
    assert (report.corruptions > 0) == damaged
    assert calls[-1][0] == calls[-1][1] > 0
    assert calls == sorted(calls)


def damaged(file: MemoryFile, chance: random.Random) -> None:
    """Change entries of L1 and L2 tables to what may be true or not, and the length of the file."""
    header, l1 = file.data[:72], entry(file, 40)
    cluster, unit = 1 << header[32], 1 << (header[32] + header[33])
    count = -(-entry(file, 24) // unit)
    words = [file.data[l1 + 8 * index : l1 + 8 * index + 8] for index in range(count)]
    order: Literal["big", "little"] = "little" if any(any(word[:4]) for word in words) else "big"
    tables = [int.from_bytes(word, order) for word in words if any(word)]
    entries = [table + 8 * number for table in tables for number in range(1 << header[33])]
    used = [place for place in entries if entry(file, place)]
    for _ in range(chance.randrange(4)):
        place = chance.choice([chance.choice(entries), chance.choice(used), l1 + 8 * chance.randrange(count)])
        old = entry(file, place)
        somewhere = chance.randrange(len(file.data) // cluster + 2) * cluster
        metadata = chance.choice([0, cluster, l1]) // cluster * cluster
        compressed = 1 << 63 | 600 << 50 | somewhere
        put(file, place, chance.choice([0, old, old + 512, somewhere, somewhere, metadata, compressed]))
    del file.data[len(file.data) - chance.choice([0, 0, 1, 512, cluster]) :]
    if chance.random() < 0.5:
        file.data += chance.choice([bytes(cluster), b"x" * cluster, b"x" * 700])


@pytest.mark.parametrize("kind", ["qemu", "qemu-compressed", "overlay", "blktap", "blktap-little", "overlay-12byte"])
def test_the_survey_says_what_the_thorough_way_says(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """For images that are whole and for such as are not, each finding and each number."""
    surveyed = 0
    whole, _ = make(kind, 3 * MIB, 1)
    for seed in range(40):
        chance = random.Random(seed)
        file = MemoryFile(bytes(whole.data))
        if seed:
            damaged(file, chance)
        monkeypatch.setattr(survey, "MAX_CLUSTERS", 1 << 20)
        quick = Check(open_leniently(file))
        monkeypatch.setattr(survey, "MAX_CLUSTERS", 0)
        thorough = Check(open_leniently(file))
        assert quick.report == thorough.report, seed
        assert (quick.leaks, quick.strays, quick.disagreements) == (
            thorough.leaks,
            thorough.strays,
            thorough.disagreements,
        )
        monkeypatch.setattr(survey, "MAX_CLUSTERS", 1 << 20)
        surveyed += survey.Survey(open_leniently(file), len(file.data), None).complete
    assert surveyed > 5 or kind in ("qemu-compressed", "blktap", "blktap-little")


def open_leniently(file: MemoryFile) -> QcowReader:
    opened_driver = FORMAT.open(file, OpenRequest(lenient=True))
    assert isinstance(opened_driver, QcowReader)
    return opened_driver
