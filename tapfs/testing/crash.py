"""An image after a crash at any moment: it checks without corruption, and all that a flush acknowledged is there.

The crash model: all before the last barrier is durable. Of what came since any part may be, in any order, torn at
sectors of 512 bytes.
"""

from __future__ import annotations

import random

from tapfs.driver import Checkable, Operation
from tapfs.errors import ImageError
from tapfs.testing.model import SECTOR, MemoryFile, ModelDisk, read_extents
from tapfs.testing.subject import Subject, ViolationError, require


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


def write_at_random(disk: ModelDisk, choice: random.Random, requests: int) -> History:
    """Writes, zeros, discards and flushes on a disk, and what may be seen of them after a crash."""
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
            disk.zero(offset, end - offset, choice.choice([Operation.ZERO, Operation.DISCARD]))
            history.changed(offset, min(end, size))
        else:
            history.flush()
    return history


def run(subject: Subject, seed: int, crashes: int) -> str:
    """One image, and that many crashes of it. Raises ViolationError; the result says what was done."""
    choice = random.Random(seed)  # noqa: S311  a test repeats itself
    file = subject.new_file().copy()  # the creation is acknowledged
    parent = subject.parent(choice)
    history = write_at_random(subject.disk(file, parent), choice, 24)
    for _ in range(crashes):
        epoch = choice.randrange(len(file.epochs))
        try:
            left = file.crashed_files(epoch, choice)
            _look(subject, left, parent, history, epoch)
            if len(left.epochs) > 1:  # a journal was replayed: the replay may be cut off, too
                again = left.crashed_files(choice.randrange(len(left.epochs)), choice)
                _look(subject, again, parent, history, epoch)
        except ImageError as error:
            raise ViolationError(f"after a crash in epoch {epoch} the image is damaged: {error}") from error
    return f"{crashes} crashes in {len(file.epochs)} epochs"


def _look(subject: Subject, left: MemoryFile, parent: bytes, history: History, epoch: int) -> None:
    """Open what a crash has left, for reading and for writing, check it and read all of it."""
    reader, shown = subject.recovered(left)
    read_only = read_extents(reader, shown, 0, reader.geometry.virtual_size, parent)
    driver = subject.opened(left, writable=True)
    if isinstance(driver, Checkable):
        report = driver.check()
        require(report.corruptions == 0, f"after a crash in epoch {epoch} a check finds {report.findings[:4]}")
    read = read_extents(driver, left, 0, driver.geometry.virtual_size, parent)
    require(read == read_only, f"after a crash in epoch {epoch} a reader sees other bytes than a writer")
    for at in range(0, len(read), SECTOR):
        seen = history.allowed(epoch, at, read[at : at + SECTOR])
        require(seen, f"after a crash in epoch {epoch} the sector at {at:#x} holds what it never held")
