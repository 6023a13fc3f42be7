"""One fault a run: call number N of one kind fails, and no other, for every N that a fixed run of operations has.

The operations, and what must hold after each, are those of `tests.faults.operations`; opening the image is one of them.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tapfs.errors import ImageError
from tests.faults.interposer import RATES, Interposer
from tests.faults.operations import Run


class _OneCall:
    """An interposer whose rates say when it is armed, and not how often a call fails."""

    def __init__(self, interposer: Interposer, rate: str, number: int) -> None:
        self._interposer, self._rate, self._number = interposer, rate, number

    def restart(self, seed: int) -> None:
        self._interposer.restart(seed)
        self._interposer.aim(self._rate, self._number)

    def host(self, *, no_holes: bool = False, cut_bytes: int = 1) -> None:
        self._interposer.host(no_holes=no_holes, cut_bytes=cut_bytes)

    @contextmanager
    def at(self, rates: Mapping[str, int]) -> Generator[None]:
        del rates
        with self._interposer.armed():
            yield


def run(interposer: Interposer, kind: str, seed: int, steps: int, folder: Path) -> tuple[str, Counter[str]]:
    """Fail every call of every kind, one at a time. Raises AssertionError; the result says how many there were."""
    counts: Counter[str] = Counter()
    for rate in RATES:
        for number in itertools.count():
            each = folder / f"{rate}-{number}"
            each.mkdir()
            try:
                _run_with_one(interposer, kind, seed, steps, each, rate, number)
            except (AssertionError, ImageError, MemoryError) as error:
                error.add_note(f"where call {number} of the kind {rate!r} fails")
                raise
            if not interposer.met:
                break
            counts[rate] += 1
    said = ", ".join(f"{number} {rate}" for rate, number in counts.items())
    return said, counts


def _run_with_one(
    interposer: Interposer, kind: str, seed: int, steps: int, folder: Path, rate: str, number: int
) -> None:
    one = Run(_OneCall(interposer, rate, number), kind, seed, folder, {each: int(each == rate) for each in RATES})
    one.open_again()
    one.steps(steps)
    if rate == "memory":
        for error in one.errors:
            assert isinstance(error, MemoryError) or "memory" in str(error), f"what failed was memory: {error!r}"
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
