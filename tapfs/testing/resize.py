"""Disks that get new sizes, among writes, and the image after a crash at any moment of that.

What is added must read as zeros, whatever the disk held there once and whatever a longer parent holds. After a crash
the disk has its old size or the new one, and nothing else has changed. The same size can then be asked for again.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import cast

from tapfs.driver import Checkable, Operation, Resizable, WritableDriver
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Extent, Kind, Range
from tapfs.plan import Plan
from tapfs.testing.laws import check_map
from tapfs.testing.model import MemoryFile, ModelDisk, is_zero, read_extents
from tapfs.testing.subject import Subject, ViolationError, require

#: Crashes of each new size.
CRASHES = 12
#: No format rounds a size by more bytes than this.
_SECTOR = 4096


def change_size(subject: Subject, file: MemoryFile, parent: bytes, size: int) -> None:
    """Give the disk in `file` another size, as `tapfs.jobs.resize` does."""
    driver = _resizable(subject, file)
    now = driver.geometry.virtual_size
    if size > now:
        _execute(file, driver.make_room(size))
        if driver.geometry.identity is None:
            grown = cast("WritableDriver", subject.opened(file, writable=True, grown_size=size))
            _zero_behind(ModelDisk(grown, file, parent), now)
        driver = _resizable(subject, file)
    _execute(file, driver.resize(size))


def _resizable(subject: Subject, file: MemoryFile) -> Resizable:
    driver = subject.opened(file, writable=True)
    if not isinstance(driver, Resizable):
        raise ViolationError(f"the driver of {driver.format_name} has no resize")
    return driver


def _execute(file: MemoryFile, plans: Iterable[Plan]) -> None:
    """Each plan before the next one is asked for: what stands after a `yield` relies on it."""
    for plan in plans:
        file.apply(plan)


def _zero_behind(disk: ModelDisk, start: int) -> None:
    """Zero what does not read as zeros behind `start`; an image in which all does is not written."""
    for each in list(_not_zero(disk, start)):
        unit = disk.driver.geometry.packed_unit
        whole = min(each.end, -(-each.offset // unit) * unit)
        if each.offset < whole:
            disk.write(each.offset, bytes(whole - each.offset))
        if whole < each.end:
            disk.zero(whole, -(-(each.end - whole) // unit) * unit, Operation.ZERO)
    if disk.begun:
        disk.end()


def _not_zero(disk: ModelDisk, start: int) -> Iterator[Range]:
    size, unit = disk.driver.geometry.virtual_size, disk.driver.geometry.packed_unit
    for extent in disk.driver.map(start, size - start):
        if extent.end > start and _shows_something(extent, disk.backing):
            low = max(start, extent.offset // unit * unit)
            start = min(size, -(-extent.end // unit) * unit)
            yield Range(low, start - low)


def _shows_something(extent: Extent, below: bytes) -> bool:
    if extent.kind is Kind.UNALLOCATED:
        return not is_zero(below[extent.offset : extent.end])
    return extent.kind is not Kind.ZERO


class _Run:
    def __init__(self, subject: Subject, seed: int) -> None:
        self._choice = random.Random(seed)  # noqa: S311  a test repeats itself
        self._subject = subject
        self._file = subject.new_file().copy()
        self._parent = subject.parent(self._choice)
        self._model = bytearray(subject.disk(self._file, self._parent).whole())

    def step(self) -> None:
        """Some writes, another size, and what every crash on the way leaves."""
        disk = self._subject.disk(self._file, self._parent)
        for _ in range(self._choice.randrange(4)):
            self._write(disk)
        disk.end()
        self._file = self._file.copy()  # all of that is durable
        old = bytes(self._model)
        size = self._change_size(self._new_size(), old)
        self._model = bytearray(self._whole(self._file))
        new = bytes(self._model)
        said = f"from {len(old)} to {size} bytes"
        require(size <= len(new) < size + _SECTOR, f"{said} the disk gets {len(new)}")
        require(new[: len(old)] == old[: len(new)], f"{said} the disk reads otherwise")
        require(is_zero(new[len(old) :]), f"{said} what is added does not read as zeros")
        check_map(self._subject.opened(self._file), 0, len(new))
        self._require_clean(self._file, said)
        for _ in range(CRASHES):
            epoch = self._choice.randrange(len(self._file.epochs))
            try:
                self._look(self._file.crashed_files(epoch, self._choice), old, new, f"{said}, a crash in epoch {epoch}")
            except ImageError as error:
                raise ViolationError(f"{said}, a crash in epoch {epoch}: the image is damaged: {error}") from error

    def _change_size(self, size: int, old: bytes) -> int:
        """Change the size; a driver may refuse one that is no whole number of sectors. The size that the disk got."""
        try:
            change_size(self._subject, self._file, self._parent, size)
        except ImageError as error:
            if error.kind is not ErrorKind.OUT_OF_BOUNDS or size % _SECTOR == 0:
                raise
            require(len(self._file.epochs) == 1 and self._whole(self._file) == old, "a size was refused too late")
            size += -size % _SECTOR
            change_size(self._subject, self._file, self._parent, size)
        return size

    def _write(self, disk: ModelDisk) -> None:
        size = len(self._model)
        if not size:
            return
        offset = self._choice.choice([self._choice.randrange(size), max(0, size - self._choice.randrange(1, 70_000))])
        data = self._choice.randbytes(min(self._choice.choice([100, 3000, 70_000]), size - offset))
        disk.write(offset, data)
        self._model[offset : offset + len(data)] = data

    def _new_size(self) -> int:
        size = len(self._model)
        step = self._choice.choice([1, 512, 4096, 65536])
        smaller, larger = size * self._choice.random(), size + self._subject.size * 2 * self._choice.random()
        wanted = int(self._choice.choice([smaller, larger, larger, size + 512, max(0, size - 512)]))
        return max(step, min(wanted, 4 * self._subject.size) // step * step)

    def _whole(self, file: MemoryFile) -> bytes:
        reader, shown = self._subject.recovered(file)
        return read_extents(reader, shown, 0, reader.geometry.virtual_size, self._parent)

    def _look(self, left: MemoryFile, old: bytes, new: bytes, when: str) -> None:
        """What a crash has left reads as before or as wanted, and the size can be changed again."""
        read = self._whole(left)
        require(read in (old, new), f"{when}: {len(read)} bytes, which read neither as before nor as wanted")
        driver = self._subject.opened(left, writable=True)
        if isinstance(driver, Checkable):
            report = driver.check()
            require(report.corruptions == 0, f"{when}: a check finds {report.findings[:4]}")
        if len(read) != len(new):
            change_size(self._subject, left, self._parent, len(new))
        require(self._whole(left) == new, f"{when}: resized again the disk reads otherwise")

    def _require_clean(self, file: MemoryFile, when: str) -> None:
        driver = self._subject.opened(file)
        if isinstance(driver, Checkable):
            report = driver.check()
            require((report.corruptions, report.leaks) == (0, 0), f"{when}: a check finds {report.findings[:4]}")


def run(subject: Subject, seed: int, sizes: int) -> str:
    """One image and that many sizes of its disk. Raises ViolationError; the result says what was done."""
    one = _Run(subject, seed)
    for _ in range(sizes):
        one.step()
    return f"{sizes} sizes"
