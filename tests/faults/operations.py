"""Random operations on one image while its host fails, against a model of what the disk may hold.

What must hold:

* an operation that succeeds changes exactly its range; one that fails changes nothing outside its range, and inside
  it each byte is the old one or the new one;
* a read that succeeds returns what the disk holds, a failed one changes nothing;
* a copy of the image file taken after a failed flush (what a kill would leave) checks without corruption, and each
  of its bytes was the disk's at the last good flush or at a moment since then;
* once the host is well again a flush succeeds and the reopened image reads as the model does;
* nothing but ImageError and MemoryError is raised.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import tapfs
from tapfs.errors import ImageError
from tests.faults.interposer import Interposer
from tests.faults.scenes import SECTOR, Scene, make, read, some_bytes


class Faults(Protocol):
    """The part of an interposer that a run of operations sets."""

    def restart(self, seed: int) -> None:
        """Begin the sequence of faults that belongs to a seed."""
        ...

    def host(self, *, no_holes: bool = False, cut_bytes: int = 1) -> None:
        """The kind of host from now on."""
        ...

    def at(self, rates: dict[str, int]) -> AbstractContextManager[None]:
        """Faults at these rates while the block runs."""
        ...


class Run:
    """One image, its model, and the operations on it. Without `rates` some are drawn."""

    def __init__(
        self, interposer: Faults, kind: str, seed: int, folder: Path, rates: Mapping[str, int] | None = None
    ) -> None:
        self._choice = choice = random.Random(f"{kind} {seed}")
        self._interposer = interposer
        interposer.restart(seed)
        self._scene: Scene = make(kind, choice, folder)
        self._copy = folder / "copy"
        self._disk = self._scene.opened()
        self._size = self._disk.size
        self._model = self._scene.content
        self._model.extend(bytes(self._size - len(self._model)))
        #: What the disk held at the last good flush, and before each change since.
        self._durable = bytes(self._model)
        self._since: list[bytes] = []
        self.rates = (
            dict(rates)
            if rates
            else {
                "write": choice.choice([0, 60, 200]),
                "cut": choice.choice([0, 150]),
                "read": choice.choice([0, 30]),
                "truncate": choice.choice([0, 300]),
                "punch": choice.choice([0, 200]),
                "memory": choice.choice([0, 0, 50]),
                "metadata": choice.choice([0, 0, 50]),
                "sync": choice.choice([0, 0, 0, 100]),
            }
        )
        # A host that goes on after a short write may have ended it anywhere. One that then fails has ended it at a
        # sector: a disk writes no less, and a plan's steps and the sectors of a cipher rely on it (tapfs/plan.py).
        anywhere = not self._scene.options["direct"] and self.rates["write"] == 0
        interposer.host(no_holes=choice.random() < 0.2, cut_bytes=1 if anywhere else SECTOR)
        self.errors: list[ImageError | MemoryError] = []

    def steps(self, count: int) -> None:
        """That many operations under faults, then the end without."""
        weights = {
            self._write: 60,
            self._zero: 10,
            self._discard: 6,
            self._read: 10,
            self._flush: 11,
            self._reopen: 3,
        }
        for _ in range(count):
            (step,) = self._choice.choices(list(weights), list(weights.values()))
            step()
            if self._choice.random() < 0.1:
                self._verify("after an operation")
        self._finish()

    def _attempt(self, operation: Callable[[], object]) -> ImageError | MemoryError | None:
        """What an operation raised under faults."""
        with self._interposer.at(self.rates):
            try:
                operation()
            except (ImageError, MemoryError) as error:
                self.errors.append(error)
                return error
        return None

    def _range(self) -> tuple[int, int]:
        offset = self._choice.randrange(self._size)
        length = int(self._choice.choice([1, 512, 4096, 9000, 70000, 300000]) * self._choice.random()) + 1
        if self._choice.random() < 0.4:
            offset -= offset % SECTOR
            length = -(-length // SECTOR) * SECTOR
        return offset, min(length, self._size - offset)

    def _write(self) -> None:
        offset, length = self._range()
        data = some_bytes(self._choice, length)
        self._changed(offset, data, self._attempt(lambda: self._disk.write(offset, data)), "write")

    def _zero(self) -> None:
        offset, length = self._range()
        error = self._attempt(lambda: self._disk.write_zeroes(offset, length))
        self._changed(offset, bytes(length), error, "zero")

    def _discard(self) -> None:
        offset, length = self._range()
        error = self._attempt(lambda: self._disk.discard(offset, length))
        self._changed(offset, bytes(length), error, "discard")

    def _changed(self, offset: int, new: bytes, error: BaseException | None, what: str) -> None:
        """Compare the disk with what the operation was allowed to change; the model is then what the disk holds."""
        before = bytes(self._model)
        self._since.append(before)
        if error is None and what != "discard":
            self._model[offset : offset + len(new)] = new
            return
        end = offset + len(new)
        now = read(self._disk, 0, self._size)
        place = f"{what} [{offset:#x}, {end:#x}), which met {error!r}"
        assert now[:offset] == before[:offset], f"bytes before the range changed in a {place}"
        assert now[end:] == before[end:], f"bytes after the range changed in a {place}"
        _require_among(now[offset:end], [before[offset:end], new], place)
        self._model[:] = now
        if isinstance(error, ImageError) and error.op == "sync":
            self._reopen_unsynced(error)  # the sync of a beginning (`Begun`)

    def _read(self) -> None:
        offset, length = self._range()
        now = b""

        def operation() -> None:
            nonlocal now
            now = read(self._disk, offset, length)

        if self._attempt(operation) is None:
            assert now == self._model[offset : offset + length], f"read [{offset:#x}, +{length:#x}) is wrong"

    def _flush(self) -> None:
        error = self._attempt(self._disk.flush)
        if error is None:
            self._acknowledged()
            return
        self._look_at_what_a_kill_leaves(error)
        if self.rates["sync"]:
            self._reopen_unsynced(error)

    def _reopen_unsynced(self, error: BaseException) -> None:
        """A failed fdatasync is never forgotten while the image is open."""
        self._disk.abandon()
        self._disk = self._scene.opened()
        self._continue_with_what_is_there(error)

    def open_again(self) -> None:
        """Close the image and open it under faults; where that fails, without."""
        self._disk.close()

        def operation() -> None:
            self._disk = self._scene.opened()

        if self._attempt(operation) is not None:
            operation()
        self._verify("after opening")

    def _reopen(self) -> None:
        error = self._attempt(self._disk.close)
        self._disk = self._scene.opened()
        if error is None:
            self._verify("after closing")
            self._acknowledged()
        else:
            self._continue_with_what_is_there(error)

    def _look_at_what_a_kill_leaves(self, error: BaseException) -> None:
        shutil.copyfile(self._scene.path, self._copy)
        if self._scene.checked:
            report = tapfs.check(self._copy)
            assert report.corruptions == 0, f"after a flush that met {error!r}: {report.findings[:4]}"
        with self._scene.opened(self._copy, writable=False, direct=False) as copy:
            _require_among(read(copy, 0, self._size), self._states(), f"a copy after a flush that met {error!r}")

    def _continue_with_what_is_there(self, error: BaseException) -> None:
        now = read(self._disk, 0, self._size)
        _require_among(now, self._states(), f"the image reopened after {error!r}")
        self._model[:] = now
        self._disk.flush()
        self._acknowledged()

    def _states(self) -> list[bytes]:
        return [bytes(self._model), self._durable, *self._since]

    def _acknowledged(self) -> None:
        self._durable = bytes(self._model)
        self._since = []

    def _verify(self, when: str) -> None:
        now = read(self._disk, 0, self._size)
        if now != self._model:
            at = next(at for at in range(self._size) if now[at] != self._model[at])
            raise AssertionError(
                f"{when}: byte {at:#x} is {now[at : at + 8].hex()}, should be {self._model[at : at + 8].hex()}"
            )

    def _finish(self) -> None:
        self._verify("at the end")
        self._disk.flush()
        self._disk.close()
        with self._scene.opened() as disk:
            now = read(disk, 0, self._size)
        assert now == self._model, "reopened at the end the disk reads otherwise"
        if self._scene.checked:
            report = tapfs.check(self._scene.path)
            assert report.corruptions == 0, report.findings[:4]


def _require_among(now: bytes, states: list[bytes], what: str) -> None:
    """Each byte must be that of one of the states."""
    for start in range(0, len(now), SECTOR):
        piece = now[start : start + SECTOR]
        if any(piece == state[start : start + len(piece)] for state in states):
            continue
        for at, byte in enumerate(piece, start):
            assert any(byte == state[at] for state in states), f"byte {at:#x} is {byte:#x}, never written there: {what}"


def run(interposer: Interposer, kind: str, seed: int, steps: int, folder: Path) -> str:
    """One run; the result says what happened. An AssertionError names what is wrong."""
    one = Run(interposer, kind, seed, folder)
    before = interposer.injected
    one.steps(steps)
    return f"{len(one.errors)} operations failed, {interposer.injected - before} faults, rates {one.rates}"
