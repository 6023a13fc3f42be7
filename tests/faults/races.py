"""Threads that use one image at once, beside a flusher, with delays between the engine and its host.

Each byte of the disk belongs to one thread, so that each thread knows what it must read. STRIPES: the threads own
interleaved stripes of odd lengths, which share granules and sectors of the host. GRANULES: the threads own whole
granules, interleaved too, and also zero and discard them whole, so that tables and places change hands.

An observer reads everywhere. It does not know what is there at that moment, but each thread writes bytes of its own, so
that bytes which the disk shows at another thread's place are known for what they are.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import tapfs
from tapfs.kernel._engine import ffi
from tapfs.kernel.writes import Segments
from tests.faults.interposer import Interposer
from tests.faults.scenes import LARGEST_BYTE, Scene, make, read

if TYPE_CHECKING:
    from tapfs.kernel._engine import CData

SIZE = 2 << 20
#: The disk's size where the granules of a kind have a MiB, so that each thread has two of them.
LARGE_GRANULES = 8 << 20
THREADS = 4
_OWNED = 12  # granules of a thread: few, so that all are used again and again
#: The bytes that each thread writes.
_BYTES = [bytes(range(THREADS + thread, LARGEST_BYTE + 1, THREADS)) for thread in range(THREADS)]
_BLOCK = 4096
_DELAY_MICROSECONDS = 300
#: The host moves a part of one transfer in five: any bytes, or whole blocks where it is direct.
_RATES = {"cut": 200}


class Ownership(StrEnum):
    """What a thread owns."""

    STRIPES = "stripes"
    GRANULES = "granules"


class Race:
    """One image that several threads use."""

    def __init__(self, kind: str, seed: int, ownership: Ownership, folder: Path) -> None:
        self._seed = f"{kind} {seed} {ownership}"
        choice = random.Random(self._seed)
        whole_blocks = kind.startswith("vdi") or (kind.startswith("vhdx") and "overlay" not in kind)
        self._size = LARGE_GRANULES if whole_blocks and ownership is Ownership.GRANULES else SIZE
        self._scene: Scene = make(kind, choice, folder, size=self._size)
        self._disk = self._scene.opened()
        self._model = self._scene.content
        self._ownership = ownership
        if ownership is Ownership.STRIPES:
            length = choice.choice([512, 700, 1500, 3000, 4096])
            owned = None
        else:
            length, owned = max(self._disk.granule, 4096), _OWNED
        starts = range(0, self._size - length + 1, length)
        self._piece = length
        self._pieces = [[(start, length) for start in starts[thread::THREADS]][:owned] for thread in range(THREADS)]
        self._before = bytes(self._model)
        self._failures: list[str] = []
        self._working = threading.Event()

    def run(self, operations: int) -> None:
        """Have each thread do that many operations, and look at the outcome."""
        self._working.set()
        workers = [threading.Thread(target=self._work, args=(thread, operations)) for thread in range(THREADS)]
        others = [threading.Thread(target=self._guarded, args=(do,)) for do in (self._flush, self._observe)]
        for thread in (*workers, *others):
            thread.start()
        for worker in workers:
            worker.join()
        self._working.clear()
        for other in others:
            other.join()
        assert not self._failures, self._failures[:3]
        assert read(self._disk, 0, self._size) == self._model, (
            "at the end the disk reads otherwise than the threads left it"
        )
        self._disk.close()
        with self._scene.opened(writable=False) as disk:
            assert read(disk, 0, self._size) == self._model, (
                "reopened the disk reads otherwise than the threads left it"
            )
        if self._scene.checked:
            report = tapfs.check(self._scene.path)
            assert (report.corruptions, report.leaks) == (0, 0), report.findings[:4]

    def _work(self, thread: int, operations: int) -> None:
        choice = random.Random(f"{self._seed} {thread}")
        step = self._step_in_stripe if self._ownership is Ownership.STRIPES else self._step_in_granule

        def work() -> None:
            for number in range(operations):
                if self._failures:
                    return
                if choice.random() < 0.2:
                    self._write_several(choice, thread, number / operations)
                else:
                    step(choice, thread, *self._next_piece(choice, thread, number / operations))

        self._guarded(work)

    def _next_piece(self, choice: random.Random, thread: int, progress: float) -> tuple[int, int]:
        """All threads go through the disk side by side, so that they meet in granules that nobody has written yet."""
        pieces = self._pieces[thread]
        if choice.random() < 0.3:
            return choice.choice(pieces)
        near = int(progress * len(pieces)) + choice.randrange(-2, 3)
        return pieces[min(max(near, 0), len(pieces) - 1)]

    def _flush(self) -> None:
        while self._working.is_set() and not self._failures:
            self._disk.flush()

    def _observe(self) -> None:
        choice = random.Random(f"{self._seed} observer")
        ends = [pieces[-1][0] + self._piece for pieces in self._pieces]
        while self._working.is_set() and not self._failures:
            at = choice.randrange(max(ends))
            now = read(self._disk, at, min(choice.randrange(1, 4 * self._piece), max(ends) - at))
            for start in range(at - at % self._piece, at + len(now), self._piece):
                piece = now[max(start - at, 0) : start + self._piece - at]
                self._require_own(piece, max(start, at), start // self._piece % THREADS)

    def _require_own(self, piece: bytes, at: int, owner: int) -> None:
        """Each byte of a piece must be zero, what the disk held at first, or one of its owner's."""
        if piece.translate(None, _BYTES[owner] + b"\0"):
            for place, byte in enumerate(piece, at):
                own = byte in (0, self._before[place]) or byte in _BYTES[owner]
                assert own, f"byte {place:#x} of thread {owner} is {byte:#x}, which the thread never wrote"

    def _guarded(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001  whatever a thread meets is the result of the run
            self._failures.append(repr(error))

    def _step_in_stripe(self, choice: random.Random, thread: int, start: int, length: int) -> None:
        at = choice.randrange(start, start + length)
        count = choice.randrange(1, start + length - at + 1)
        what = choice.random()
        if what < 0.5:
            self._write(choice, thread, at, count)
        elif what < 0.6:
            self._disk.write_zeroes(at, count)
            self._model[at : at + count] = bytes(count)
        else:
            self._read(at, count)

    def _step_in_granule(self, choice: random.Random, thread: int, start: int, length: int) -> None:
        what = choice.random()
        if what < 0.35:
            at = choice.randrange(start, start + length)
            self._write(choice, thread, at, choice.randrange(1, start + length - at + 1))
        elif what < 0.55:
            self._disk.write_zeroes(start, length)
            self._model[start : start + length] = bytes(length)
        elif what < 0.7:
            self._discard(start, length)
        else:
            self._read(start, length)

    def _write(self, choice: random.Random, thread: int, at: int, count: int) -> None:
        data = bytes([choice.choice(_BYTES[thread])]) * count
        self._disk.write(at, data)
        self._model[at : at + count] = data

    def _write_several(self, choice: random.Random, thread: int, progress: float) -> None:
        """Parts of several pieces in one write of the image."""
        byte = choice.choice(_BYTES[thread])
        memory = ffi.new("uint8_t[]", bytes([byte]) * self._piece)
        runs: list[tuple[int, int, CData]] = []
        for start, length in sorted(
            {self._next_piece(choice, thread, progress) for _ in range(choice.randrange(2, 6))}
        ):
            at = choice.choice([start, choice.randrange(start, start + length)])
            runs.append((at, choice.randrange(1, start + length - at + 1), memory))
        self._disk.write_segments(Segments(runs))
        for at, count, _ in runs:
            self._model[at : at + count] = bytes([byte]) * count

    def _read(self, at: int, count: int) -> None:
        now, wanted = read(self._disk, at, count), self._model[at : at + count]
        assert now == wanted, f"read [{at:#x}, +{count:#x}): {_first_difference(now, wanted)}"

    def _discard(self, start: int, length: int) -> None:
        """What was discarded reads as zeros or as it was, byte by byte."""
        self._disk.discard(start, length)
        now, before = read(self._disk, start, length), self._model[start : start + length]
        expected = bytes(old if byte else 0 for byte, old in zip(now, before, strict=True))
        assert now == expected, f"discarded [{start:#x}, +{length:#x}): {_first_difference(now, expected)}"
        self._model[start : start + length] = now


def _first_difference(now: bytes, wanted: bytes | bytearray) -> str:
    at = next(at for at in range(len(now)) if now[at] != wanted[at])
    return f"byte {at:#x} is {now[at]:#x}, should be {wanted[at]:#x}"


def run(interposer: Interposer, kind: str, seed: int, ownership: Ownership, operations: int, folder: Path) -> str:
    """One race; the result says what happened. An AssertionError names what is wrong."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(2e-5)
    try:
        race = Race(kind, seed, ownership, folder)
        interposer.restart(seed)
        cut_bytes = _BLOCK if kind.endswith("-direct") else 1
        interposer.host(cut_bytes=cut_bytes, delay_microseconds=_DELAY_MICROSECONDS)
        with interposer.at(_RATES):
            race.run(operations)
    finally:
        interposer.host()
        sys.setswitchinterval(interval)
    return f"{THREADS} threads with {operations} operations each"
