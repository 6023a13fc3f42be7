"""Random requests on an image of a writable format, against a bytearray that must always read the same."""

from __future__ import annotations

import random
from collections.abc import Callable

from tapfs.driver import Checkable, Operation, Reservation
from tapfs.testing.laws import check_map, check_split
from tapfs.testing.model import ModelDisk, is_zero
from tapfs.testing.subject import Subject, require


class _Run:
    def __init__(self, subject: Subject, seed: int) -> None:
        self._choice = choice = random.Random(seed)  # noqa: S311  a test repeats itself
        self._subject = subject
        self._file = subject.new_file()
        self._parent = subject.parent(choice)
        self._disk: ModelDisk = subject.disk(self._file, self._parent)
        self._size = self._disk.driver.geometry.virtual_size
        self._granule = self._disk.driver.geometry.granule
        #: Zeros and discards come in these.
        self._zero_granule = self._disk.driver.geometry.packed_unit
        new, below = self._disk.whole(), self._parent[: self._size].ljust(self._size, b"\0")
        self._model = bytearray(new)
        require(new == below, "a new image reads otherwise than its parent, or zeros where there is none")
        self._open: list[tuple[list[tuple[int, bytes]], Reservation]] = []

    def step(self) -> None:
        """One request of some kind, and what must hold after it."""
        kinds: list[tuple[Callable[[], None], int]] = [
            (self._write, 8),
            (self._zero, 4),
            (self._reserve, 3),
            (self._settle, 3),
            (self._meet_a_full_host, 2),
            (self._flush, 2),
            (self._fail_a_flush, 1),
            (self._reopen, 1),
        ]
        (kind,) = self._choice.choices([kind for kind, _ in kinds], [weight for _, weight in kinds])
        kind()
        if not self._open:
            self._require_same(f"after {kind.__name__.strip('_')}")
        offset, end = self._range(self._size)
        check_map(self._disk.driver, offset, end - offset)
        if not self._open:
            check_split(self._disk.driver, offset, end - offset)

    def finish(self) -> None:
        """Settle what is open, and look at the image once more."""
        while self._open:
            self._settle()
        self._reopen()

    def _require_same(self, when: str) -> None:
        require(self._disk.whole() == bytes(self._model), f"{when} the disk reads otherwise")

    def _range(self, longest: int) -> tuple[int, int]:
        offset = self._choice.randrange(self._size)
        return offset, offset + min(self._choice.randrange(1, longest), self._size - offset)

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
        offset, end = self._granules(700_000, self._zero_granule)
        if self._busy(offset, end):
            return
        operation = self._choice.choice([Operation.ZERO, Operation.DISCARD])
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
        self._disk.flush()

    def _fail_a_flush(self) -> None:
        """Execute a part of the plan only: the next flush must bring all of it again."""
        plan = self._disk.driver.flush()
        for stage in plan.stages[: self._choice.randrange(len(plan.stages) + 1)]:
            for step in stage:
                self._file.do(step)

    def _reopen(self) -> None:
        if self._open:
            return
        self._disk.flush()
        if self._choice.random() < 0.8:
            self._disk.end()
        self._disk = self._subject.disk(self._file, self._parent)
        self._require_same("reopened")
        if isinstance(self._disk.driver, Checkable):
            report = self._disk.driver.check()
            require((report.corruptions, report.leaks) == (0, 0), f"a check finds {report.findings[:4]}")


def run(subject: Subject, seed: int, steps: int) -> str:
    """One image and that many requests. Raises ViolationError; the result says what was done."""
    one = _Run(subject, seed)
    for _ in range(steps):
        one.step()
    one.finish()
    return f"{steps} requests"
