"""VMDK disks that get another size: directories that move, and descriptors that have little room."""

from __future__ import annotations

import random

import pytest

from tapfs.driver import CreateRequest, OpenRequest
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.vmdk import FORMAT
from tapfs.testing import resize
from tapfs.testing.model import MemoryFile, read_extents
from tapfs.testing.subject import Subject

GIB = 1 << 30
MIB = 1 << 20


def new(size: int, subformat: str = "monolithicSparse", name: str = "a.vmdk") -> MemoryFile:
    request = CreateRequest(size, options={"subformat": subformat}, name=name)
    file = MemoryFile(further={each: MemoryFile(path=each) for each in FORMAT.further_names(request)})
    file.apply(FORMAT.create(request))
    return file.copy()


@pytest.mark.parametrize("subformat", ["monolithicSparse", "vmfsSparse"])
def test_directories_that_move(subformat: str) -> None:
    subject = Subject(FORMAT)
    file = new(GIB, subformat)
    disk = subject.disk(file, b"")
    data = {at: bytes([at % 251 + 1]) * 4096 for at in (0, GIB // 2, GIB - 4096)}
    for at, written in data.items():
        disk.write(at, written)
    disk.end()
    file = file.copy()
    resize.change_size(subject, file, b"", 40 * GIB)
    look(subject, file, data, (40 * GIB,))
    choice = random.Random(1)
    for epoch in range(len(file.epochs)):
        for _ in range(4):
            left = file.crashed_files(epoch, choice)
            look(subject, left, data, (GIB, 40 * GIB))
            resize.change_size(subject, left, b"", 40 * GIB)
            look(subject, left, data, (40 * GIB,))
    disk = subject.disk(file, b"")
    data[39 * GIB] = b"far" * 1000
    disk.write(39 * GIB, data[39 * GIB])
    disk.end()
    look(subject, file, data, (40 * GIB,))
    resize.change_size(subject, file, b"", GIB)
    del data[39 * GIB]
    look(subject, file, data, (GIB,))


def look(subject: Subject, file: MemoryFile, data: dict[int, bytes], sizes: tuple[int, ...]) -> None:
    driver = subject.opened(file)
    assert driver.geometry.virtual_size in sizes
    for at, written in data.items():
        assert read_extents(driver, file, at, len(written)) == written
    report = driver.check()  # type: ignore[attr-defined]
    assert report.corruptions == 0, report.findings


@pytest.mark.parametrize("padding", [0, 60, 100, 200, 260, 300, 330, 400, 600])
@pytest.mark.parametrize("subformat", ["monolithicSparse", "monolithicFlat"])
def test_no_crash_tears_the_descriptor(subformat: str, padding: int) -> None:
    file = new(MIB, subformat)
    base = 512 if subformat == "monolithicSparse" else 0
    text = bytes(file.data[base:]).split(b"\0", 1)[0]
    longer = text.replace(b"# Extent description", b"#" * padding + b"\n# Extent description", 1)
    longer = longer.replace(b"# The Disk Data Base\n#DDB\n", b"")
    file.data[base : base + max(len(text), len(longer))] = longer.ljust(len(text), b"\0")
    file = file.copy()
    wanted = 6 * MIB if subformat == "monolithicFlat" else 20 * GIB
    driver = FORMAT.open(file, OpenRequest(writable=True, further=file))
    if subformat == "monolithicFlat" and has_no_room(longer):
        with pytest.raises(ImageError) as raised:
            driver.make_room(wanted)  # type: ignore[attr-defined]
        assert raised.value.kind is ErrorKind.UNSUPPORTED
        assert "comment" in str(raised.value.remedy)
        return
    resize.change_size(Subject(FORMAT), file, b"", wanted)
    choice = random.Random(1)
    for epoch in range(len(file.epochs)):
        for _ in range(6):
            left = file.crashed_files(epoch, choice)
            driver = FORMAT.open(left, OpenRequest(further=left))
            assert driver.geometry.virtual_size in (MIB, wanted)
    assert FORMAT.open(file, OpenRequest(further=file)).geometry.virtual_size == wanted


def has_no_room(longer: bytes) -> bool:
    """Whether a text of a file of its own goes on behind its first sector."""
    return len(longer) + 1 > 512


def test_a_split_disk_gets_no_part_that_is_too_long() -> None:
    file = new(MIB, "twoGbMaxExtentSparse")
    driver = FORMAT.open(file, OpenRequest(writable=True, further=file))
    with pytest.raises(ImageError, match="2147483648") as raised:
        driver.make_room(3 * GIB)  # type: ignore[attr-defined]
    assert "convert" in str(raised.value.remedy)
