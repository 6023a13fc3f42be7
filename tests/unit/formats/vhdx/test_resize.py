"""VHDX disks whose block table has no room: it moves to the end of the file by an entry of the log."""

from __future__ import annotations

import random

from tapfs.driver import CreateRequest
from tapfs.formats.vhdx import FORMAT
from tapfs.testing import resize
from tapfs.testing.model import MemoryFile, read_extents
from tapfs.testing.subject import Subject

GIB = 1 << 30
BLOCK = 1 << 20


def test_a_table_that_moves() -> None:
    subject = Subject(FORMAT, 100 * GIB, {"block_size": str(BLOCK)})
    file = MemoryFile()
    file.apply(FORMAT.create(CreateRequest(100 * GIB, options=subject.options)))
    disk = subject.disk(file, b"")
    data = {at: bytes([at % 251 + 1]) * 4096 for at in (0, 50 * GIB, 100 * GIB - 4096)}
    for at, written in data.items():
        disk.write(at, written)
    disk.end()
    before = file.copy()
    file = before.copy()
    resize.change_size(subject, file, b"", 300 * GIB)
    look(subject, file, data, 300 * GIB)
    assert file.size() > before.size()
    choice = random.Random(1)
    for epoch in range(len(file.epochs)):
        for _ in range(4):
            left = file.crashed_files(epoch, choice)
            look(subject, left, data, None)
            assert subject.opened(left, writable=True).check().corruptions == 0  # type: ignore[attr-defined]
    resize.change_size(subject, file, b"", 51 * GIB)
    del data[100 * GIB - 4096]
    look(subject, file, data, 51 * GIB)
    report = subject.opened(file).check()  # type: ignore[attr-defined]
    assert (report.corruptions, report.leaks) == (0, 0), report.findings


def look(subject: Subject, file: MemoryFile, data: dict[int, bytes], size: int | None) -> None:
    driver, shown = subject.recovered(file)
    assert driver.geometry.virtual_size in ((100 * GIB, 300 * GIB) if size is None else (size,))
    for at, written in data.items():
        assert read_extents(driver, shown, at, len(written)) == written
