"""An image after a crash at any moment: it checks without corruption, and all that a flush acknowledged is there.

The crash model: all before the last barrier is durable. Of what came since any part may be, in any order, torn at
sectors of 512 bytes.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import NamedTuple

from tapfs.driver import Checkable, Operation, PartlyZeroing, Uncovering
from tapfs.errors import ImageError
from tapfs.plan import Plan
from tapfs.testing.model import SECTOR, MemoryFile, ModelDisk, may_zero, read_extents
from tapfs.testing.subject import Subject, ViolationError, require

#: Bytes of a disk that are compared at once.
_PIECE = 32 << 10


class History:
    """Which contents each sector of the disk may have after a crash in each epoch of its host file."""

    def __init__(self, disk: ModelDisk) -> None:
        self.disk = disk
        self.now = bytearray(disk.whole())
        self.acknowledged = bytes(self.now)
        #: Sector: what it was made since the last completed flush.
        self.since: dict[int, list[bytes]] = {}
        #: What stood when an epoch began; filled as epochs are opened.
        self.epochs: list[tuple[bytes, dict[int, list[bytes]]]] = []
        self.note()

    def changed(self, offset: int, end: int) -> None:
        """The disk's bytes in the range have changed."""
        start, stop = offset // SECTOR * SECTOR, min(-(-end // SECTOR) * SECTOR, len(self.now))
        read = self.disk.read(start, stop - start)
        for at in range(start, stop, SECTOR):
            piece = read[at - start : at - start + SECTOR]
            if piece != bytes(self.now[at : at + SECTOR]):
                self.since.setdefault(at, []).append(piece)
        self.now[start:stop] = read
        self.note()

    def note(self) -> None:
        """Remember what the epoch that is open now may show."""
        current = self.acknowledged, {at: list(pieces) for at, pieces in self.since.items()}
        while len(self.epochs) < len(self.disk.file.epochs):
            self.epochs.append(current)
        self.epochs[-1] = current

    def flush(self) -> None:
        """Flush; every epoch but the last that it opens may still show what was before."""
        self.disk.flush()
        self.note()
        self.acknowledged = bytes(self.now)
        self.since = {}
        self.note()

    def allowed(self, epoch: int, at: int, piece: bytes) -> bool:
        """Whether a sector may read so after a crash in `epoch`."""
        acknowledged, since = self.epochs[epoch]
        return piece == acknowledged[at : at + SECTOR] or piece in since.get(at, ())

    def wrong(self, epoch: int, read: bytes) -> int | None:
        """The first sector of a disk that may not read so after a crash in `epoch`, or None."""
        acknowledged = self.epochs[epoch][0]
        if read == acknowledged:
            return None
        for start in range(0, len(read), _PIECE):
            if read[start : start + _PIECE] != acknowledged[start : start + _PIECE]:
                for at in range(start, min(start + _PIECE, len(read)), SECTOR):
                    if not self.allowed(epoch, at, read[at : at + SECTOR]):
                        return at
        return None


def write_at_random(disk: ModelDisk, choice: random.Random, requests: int) -> History:
    """Writes, zeros, discards, uncoverings and flushes on a disk, and what may be seen of them after a crash."""
    history = History(disk)
    granule = disk.driver.geometry.packed_unit
    size = disk.driver.geometry.virtual_size
    for _ in range(requests):
        what = choice.random()
        offset = choice.randrange(size)
        if what < 0.55:
            data = choice.randbytes(min(choice.choice([100, 3000, 20000, 120_000]), size - offset))
            disk.write(offset, data)
            history.changed(offset, offset + len(data))
        elif what < 0.8:
            offset -= offset % granule
            end = min(offset + granule * choice.choice([1, 5, 100]), -(-size // granule) * granule)
            operations = [Operation.ZERO, Operation.DISCARD]
            over_parent = disk.driver.geometry.backing is not None
            if over_parent and isinstance(disk.driver, Uncovering) and disk.driver.can_uncover:
                operations.append(Operation.UNCOVER)
            operation = choice.choice(operations)
            if operation is Operation.ZERO and isinstance(disk.driver, PartlyZeroing):
                smaller = disk.driver.geometry.granule
                start = offset + choice.randrange(granule // smaller) * smaller
                stop = min(end, -(-size // smaller) * smaller) - choice.choice([0, smaller])
                if start < stop and may_zero(disk.driver, start, stop):
                    offset, end = start, stop
            disk.zero(offset, end - offset, operation)
            history.changed(offset, min(end, size))
        else:
            history.flush()
    return history


class Outcome(NamedTuple):
    """How many crashes of an image were looked at, cut-off replays of journals among them, and its epochs."""

    crashes: int
    epochs: int


def run(subject: Subject, seed: int, crashes: int) -> str:
    """One image, and that many crashes of it. Raises ViolationError; the result says what was done."""
    outcome = crash_often(subject, seed, crashes)
    return f"{outcome.crashes} crashes in {outcome.epochs} epochs"


def crash_often(subject: Subject, seed: int, crashes: int) -> Outcome:
    """The same as `run`, with the result in numbers."""
    choice = random.Random(seed)  # noqa: S311  a test repeats itself
    file, parent = subject.begin(choice)
    snapshots = subject.snapshots(file, parent)
    disk = subject.disk(file, parent)
    history = write_at_random(disk, choice, 24)
    if choice.random() < 0.5:
        disk.end()
        history.note()
    looked_at = 0
    for epoch, left in file.crashes(crashes, choice):
        try:
            _look(subject, left, parent, history, epoch, snapshots)
            looked_at += 1
            if len(left.epochs) > 1:  # a journal was replayed: the replay may be cut off, too
                again = left.crashed_files(choice.randrange(len(left.epochs)), choice)
                _look(subject, again, parent, history, epoch, snapshots)
                looked_at += 1
        except ImageError as error:
            raise ViolationError(f"after a crash in epoch {epoch} the image is damaged: {error}") from error
    return Outcome(looked_at, len(file.epochs))


def run_repair(subject: Subject, file: MemoryFile, parent: bytes, crashes: int) -> None:
    """Repair a damaged image, with that many crashes in each epoch of the repair. Raises ViolationError.

    Each crash leaves an image that reads as before, and that a repair makes good.
    """
    choice = random.Random(1)  # noqa: S311  as above
    file = file.copy()
    whole = subject.whole(file, parent)
    snapshots = subject.snapshots(file, parent)
    _repair(subject, file)
    require(len(file.epochs) > 2, "a damaged image is repaired by nothing")
    for epoch in range(len(file.epochs)):
        for _ in range(crashes):
            left, when = file.crashed_files(epoch, choice), f"after a crash in epoch {epoch} of a repair"
            require(subject.whole(left, parent) == whole, f"{when} the disk reads otherwise")
            _repair(subject, left)
            again = subject.opened(left, writable=True)
            if isinstance(again, Checkable):
                report = again.check()
                require((report.corruptions, report.leaks) == (0, 0), f"{when} and another: {report.findings[:4]}")
                require(not list(again.repair()), f"{when} and another there is still something to repair")
            require(subject.leaks(left, parent, snapshots) in {0, None}, f"{when} and another something leaks")
            require(subject.whole(left, parent) == whole, f"{when} and another the disk reads otherwise")


def _repair(subject: Subject, file: MemoryFile) -> None:
    """Repair until nothing is left: what leaks is given back once the tables are good."""
    for _ in range(3):
        driver = subject.opened(file, lenient=True)
        plans = list(driver.repair()) if isinstance(driver, Checkable) else []
        file.apply_all(plans)
        if not plans:
            return


def in_wrong_order(plan: Plan, order: str) -> Plan:
    """The steps of a plan in an order that no driver should choose: stages "reversed", or all in "one stage"."""
    stages = list(plan.stages)
    if order == "reversed":
        stages.reverse()
    else:
        stages = [tuple(step for stage in stages for step in stage)]
    return Plan(tuple(stages))


def _look(
    subject: Subject, left: MemoryFile, parent: bytes, history: History, epoch: int, snapshots: Mapping[str, bytes]
) -> None:
    """Open what a crash has left, for reading and for writing, check it and read all of it."""
    when = f"after a crash in epoch {epoch}"
    reads = {"a reader": subject.whole(left, parent)}
    driver = subject.opened(left, writable=True)
    leaks = subject.leaks(left, parent, snapshots)
    if isinstance(driver, Checkable):
        report = driver.check()
        require(report.corruptions == 0, f"{when} a check finds {report.findings[:4]}")
        require(leaks in {None, report.leaks}, f"{when} a check finds {report.leaks} leaks, another {leaks}")
    reads["a writer"] = read_extents(driver, left, 0, driver.geometry.virtual_size, parent)
    reads |= subject.readers(left, parent, crashed=True)
    for name, read in reads.items():
        wrong = history.wrong(epoch, read)
        require(wrong is None, f"{when} {name} sees what the sector at {wrong or 0:#x} never held")
    require(reads["a reader"] == reads["a writer"], f"{when} a reader sees other bytes than a writer")
    require(subject.snapshots(left, parent) == snapshots, f"{when} a snapshot reads otherwise")
