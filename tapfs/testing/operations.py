"""Random requests on an image of a writable format, against a bytearray that must always read the same."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import cast

from tapfs.driver import Checkable, Operation, PartlyZeroing, Reservation, Resizable, SnapshotKeeper, Uncovering
from tapfs.errors import ErrorKind, ImageError
from tapfs.plan import Plan
from tapfs.testing.laws import check_map, check_split
from tapfs.testing.model import ModelDisk, is_zero, may_zero
from tapfs.testing.resize import change_size
from tapfs.testing.subject import Subject, require

#: Bytes around a request that are compared after it; after every so many requests the whole disk is.
_AROUND, _WHOLE = 100_000, 8
#: New sizes are multiples of this many bytes.
_SIZES = 32 << 10
#: A flush may leave a bounded part of its work to the next one.
_MOST_FLUSHES = 16
#: Of the zeros so many are of parts of packed units, where a driver can say that.
_PARTLY = 0.6


class _Run:
    def __init__(self, subject: Subject, seed: int) -> None:
        self._choice = choice = random.Random(seed)  # noqa: S311  a test repeats itself
        self._subject = subject
        self._file, self._parent = subject.begin(choice)
        self._disk: ModelDisk = subject.disk(self._file, self._parent)
        self._size = self._disk.driver.geometry.virtual_size
        self._granule = self._disk.driver.geometry.granule
        #: Zeros and discards come in these.
        self._zero_granule = self._disk.driver.geometry.packed_unit
        self._model = bytearray(self._disk.whole())
        #: The disks of the snapshots inside the image, by name.
        self._snapshots = subject.snapshots(self._file, self._parent)
        #: Where the last request was; the number of requests so far.
        self._near, self._steps = (0, self._size), 0
        self._open: list[tuple[list[tuple[int, bytes]], Reservation]] = []

    def step(self) -> None:
        """One request of some kind, and what must hold after it."""
        kinds: list[tuple[Callable[[], None], int]] = [
            (self._write, 8),
            (self._zero, 4),
            (self._uncover, 1),
            (self._reserve, 3),
            (self._settle, 3),
            (self._meet_a_full_host, 2),
            (self._flush, 2),
            (self._fail_a_flush, 1),
            (self._reopen, 1),
            (self._repair, 1),
        ]
        if self._subject.edited:
            kinds += [(self._snapshot, 1), (self._resize, 1)]
        (kind,) = self._choice.choices([kind for kind, _ in kinds], [weight for _, weight in kinds])
        self._steps += 1
        kind()
        if not self._open:
            self._require_same(f"after {kind.__name__.strip('_')}", whole=self._steps % _WHOLE == 0)
        if self._size:
            offset, end = self._range(self._size)
            (check_map if self._open else check_split)(self._disk.driver, offset, end - offset)

    def finish(self) -> None:
        """Settle what is open, and look at the image once more."""
        while self._open:
            self._settle()
        self._reopen()

    def _require_same(self, when: str, *, whole: bool = True) -> None:
        """Compare the disk with the model; all of it, or what the last request was near."""
        start, end = (0, self._size) if whole else (max(0, self._near[0] - _AROUND), self._near[1] + _AROUND)
        end = min(end, self._size)
        same = self._disk.read(start, end - start) == bytes(self._model[start:end])
        require(same, f"{when} the disk reads otherwise")

    def _range(self, longest: int) -> tuple[int, int]:
        offset = self._choice.randrange(self._size)
        self._near = offset, offset + min(self._choice.randrange(1, longest + 1), self._size - offset)
        return self._near

    def _granules(self, longest: int, granule: int | None = None) -> tuple[int, int]:
        """A random range of whole granules; the last may reach past the end of the disk."""
        offset, end = self._range(longest)
        granule = granule or self._granule
        return offset // granule * granule, -(-end // granule) * granule

    def _busy(self, offset: int, end: int) -> bool:
        return any(offset < each.end and each.offset < end for _, held in self._open for each in held.ranges)

    def _write(self) -> None:
        offset, end = self._range(300_000)
        if self._busy(offset - self._granule, end + self._granule):
            return
        data = self._choice.randbytes(end - offset)
        self._disk.write(offset, data)
        self._model[offset:end] = data

    def _zero(self) -> None:
        if isinstance(self._disk.driver, PartlyZeroing) and self._choice.random() < _PARTLY:
            offset, end = self._granules(4 * self._zero_granule)
            operation = Operation.ZERO
            if not may_zero(self._disk.driver, offset, end):
                return
        else:
            offset, end = self._granules(700_000, self._zero_granule)
            operation = self._choice.choice([Operation.ZERO, Operation.DISCARD])
        if self._busy(offset, end):
            return
        self._disk.zero(offset, end - offset, operation)
        end = min(end, self._size)
        if operation is Operation.ZERO:
            self._model[offset:end] = bytes(end - offset)
            return
        for start in range(offset, end, self._granule):
            stop = min(start + self._granule, end)
            now = self._disk.read(start, stop - start)
            kept = now == bytes(self._model[start:stop])
            require(kept or is_zero(now), f"what was discarded at {start} reads neither as before nor as zeros")
            self._model[start:stop] = now

    def _uncover(self) -> None:
        """Have a range show the parent again, or all of the disk, as a commit does.

        A driver may keep what it has in a map unit of which the range covers a part.
        """
        driver = self._disk.driver
        if driver.geometry.backing is None or not (isinstance(driver, Uncovering) and driver.can_uncover):
            return
        offset, end = self._granules(700_000, self._zero_granule)
        if self._choice.random() < 0.3:
            offset, end = 0, -(-self._size // self._zero_granule) * self._zero_granule
            self._near = 0, self._size
        if self._busy(offset, end):
            return
        self._disk.zero(offset, end - offset, Operation.UNCOVER)
        end, unit = min(end, self._size), driver.geometry.map_unit
        for start in range(offset, end, self._granule):
            stop = min(start + self._granule, end)
            now, below = self._disk.read(start, stop - start), self._parent[start:stop].ljust(stop - start, b"\0")
            partly = start // unit * unit < offset or (-(-stop // unit) * unit > end and end < self._size)
            kept = partly and now == bytes(self._model[start:stop])
            require(kept or now == below, f"what was uncovered at {start} does not read as the parent does")
            self._model[start:stop] = now

    def _reserve(self) -> None:
        """Reserve and write in several ranges at once, and leave it open for later."""
        pieces: list[tuple[int, bytes]] = []
        places = [extent for extent in self._disk.driver.map(0, self._size) if not extent.in_place]
        for extent in sorted(self._choice.sample(places, min(len(places), self._choice.choice([1, 5])))):
            granules = extent.length // self._granule
            start = self._choice.randrange(granules)
            count = self._choice.randrange(1, min(granules - start, max(1, 100_000 // self._granule)) + 1)
            offset = extent.offset + start * self._granule
            end = offset + count * self._granule
            if not self._busy(offset, end):
                pieces.append((offset, self._choice.randbytes(min(end, self._size) - offset)))
        if pieces:
            self._open.append((pieces, self._disk.start_writes(pieces)))

    def _meet_a_full_host(self) -> None:
        """A request for which the host has no space: the flushes after it need none that they do not have."""
        operation = self._choice.choice([Operation.WRITE, Operation.ZERO])
        offset, end = self._granules(300_000, self._zero_granule)
        mapped = self._disk.driver.map(offset, end - offset)
        places = [each for each in mapped if not each.in_place and each.offset < end and offset < each.end]
        if operation is Operation.WRITE and places:  # only such granules are reserved
            offset, end = max(offset, places[0].offset), min(end, places[0].end)
        if (operation is Operation.ZERO or places) and not self._busy(offset, end):
            self._disk.refuse(offset, end - offset, operation)

    def _settle(self) -> None:
        """End an open reservation: committed, or aborted as after a failed write."""
        if not self._open:
            return
        pieces, reservation = self._open.pop(self._choice.randrange(len(self._open)))
        commit = self._choice.random() < 0.6
        if commit:
            self._disk.driver.commit(reservation)
        else:
            self._disk.driver.abort(reservation)
        for offset, data in pieces:
            end = offset + len(data)
            now = data if commit else self._disk.read(offset, len(data))
            # Bytes that were written to a place which became visible meanwhile may be seen.
            allowed = (bytes(self._model[offset:end]), data)
            require(now in allowed, f"an aborted write at {offset} left something else")
            self._model[offset:end] = now

    def _flush(self) -> None:
        """Flush until nothing is left, which a plan or a few of them reach."""
        for _ in range(_MOST_FLUSHES):
            self._disk.flush()
            if not self._disk.driver.flush():
                return
        require(False, f"{_MOST_FLUSHES} flushes have left something, and nothing was changed between them")

    def _fail_a_flush(self) -> None:
        """Execute a part of the plan only: the next flush must bring all of it again."""
        plan = self._disk.driver.flush()
        for stage in plan.stages[: self._choice.randrange(len(plan.stages) + 1)]:
            for step in stage:
                self._file.do(step)

    def _reopen(self) -> None:
        if not self._open:
            self._close()
            self._open_again("reopened")

    def _repair(self) -> None:
        """A repair of an image in good order changes nothing that is read."""
        if self._open:
            return
        self._close()
        driver = self._subject.opened(self._file, lenient=True)
        if isinstance(driver, Checkable):
            self._file.apply_all(list(driver.repair()))
        self._open_again("repaired")

    def _snapshot(self) -> None:
        """Make, apply or delete a snapshot inside the image, where the format keeps such."""
        keeper = self._disk.driver
        if self._open or not isinstance(keeper, SnapshotKeeper):
            return
        self._close(ended=True)
        keeper = cast("SnapshotKeeper", self._subject.opened(self._file, writable=True))
        name = self._choice.choice([*self._snapshots, f"s{self._steps}"])
        if name not in self._snapshots:
            if self._edit(keeper.create_snapshot(name, self._steps)):
                self._snapshots[name] = bytes(self._model)
        elif self._choice.random() < 0.5:
            if self._edit(keeper.apply_snapshot(name)):
                self._model = bytearray(self._snapshots[name])
        elif self._edit(keeper.delete_snapshot(name)):
            del self._snapshots[name]
        self._open_again(f"after an edit of snapshot {name}")

    def _resize(self) -> None:
        """Another size, where the image can have it."""
        if self._open or not isinstance(self._disk.driver, Resizable):
            return
        self._close(ended=True)
        size = max(_SIZES, self._size + self._choice.choice([-9, -1, 1, 30]) * _SIZES) // _SIZES * _SIZES
        if size < 2 * self._subject.size and self._tried(lambda: self._change_size(size)):
            self._model = self._model[:size].ljust(size, b"\0")
        self._open_again(f"with {size} bytes")

    def _change_size(self, size: int) -> None:
        change_size(self._subject, self._file, self._parent, size)

    def _edit(self, plans: Iterator[Plan]) -> bool:
        """Execute an edit, each plan before the next one is asked for; False if the image cannot have it."""

        def execute() -> None:
            for plan in plans:
                self._file.apply(plan)

        return self._tried(execute)

    def _tried(self, edit: Callable[[], None]) -> bool:
        before = bytes(self._file.data)
        try:
            edit()
        except ImageError as error:
            refused = error.kind in {ErrorKind.UNSUPPORTED, ErrorKind.OUT_OF_BOUNDS}
            require(refused and bytes(self._file.data) == before, f"an edit fails or leaves something: {error}")
            return False
        return True

    def _close(self, *, ended: bool | None = None) -> None:
        self._disk.flush()
        if ended or (ended is None and self._choice.random() < 0.8):
            self._disk.end()

    def _open_again(self, when: str) -> None:
        """Open the image anew; everybody who can read it reads the same, and nothing is wrong with it."""
        subject = self._subject
        self._disk = subject.disk(self._file, self._parent)
        self._size = self._disk.driver.geometry.virtual_size
        require(self._size == len(self._model), f"{when} the disk has {self._size} bytes")
        self._near = 0, self._size
        self._require_same(when)
        for name, read in subject.readers(self._file, self._parent, crashed=False).items():
            require(read == bytes(self._model), f"{when} {name} reads otherwise")
        require(subject.snapshots(self._file, self._parent) == self._snapshots, f"{when} a snapshot reads otherwise")
        require(subject.leaks(self._file, self._parent, self._snapshots) in {0, None}, f"{when} something leaks")
        if isinstance(self._disk.driver, Checkable):
            report = self._disk.driver.check()
            leaks = 0 if subject.may_leak else report.leaks
            require((report.corruptions, leaks) == (0, 0), f"{when} a check finds {report.findings[:4]}")


def run(subject: Subject, seed: int, steps: int) -> str:
    """One image and that many requests. Raises ViolationError; the result says what was done."""
    one = _Run(subject, seed)
    for _ in range(steps):
        one.step()
    one.finish()
    return f"{steps} requests"
