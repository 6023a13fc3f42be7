"""Edits of sound images, as a fuzzer gives them: an input says which image, and what is changed where.

So inputs are a few bytes each. Most edited images are sound but for a field, which gets them past the first checks.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Protocol

from tapfs.testing.hostile import EDGES, use
from tapfs.testing.model import MemoryFile
from tapfs.testing.subject import Subject
from tests.driver_rows import ROWS

_MOST_EDITS = 8
_WIDTHS = (1, 2, 4, 8)


class Input(Protocol):
    """What a fuzzer gives, number by number: an `atheris.FuzzedDataProvider`, or `Numbers`."""

    def ConsumeIntInRange(self, low: int, high: int, /) -> int:  # noqa: N802  the name is the library's
        """A number between two, both included."""
        ...


class Numbers:
    """Numbers by chance: an input without a fuzzer."""

    def __init__(self, seed: int) -> None:
        self._choice = random.Random(seed)

    def ConsumeIntInRange(self, low: int, high: int, /) -> int:  # noqa: N802  as above
        """A number between two, both included."""
        return self._choice.randint(low, high)


def try_one(given: Input, formats: list[str]) -> str:
    """Edit an image of one of the formats as the input says, and ask its driver for everything; the image's kind.

    Raises whatever is no ImageError, and ViolationError where an answer breaks the contract of drivers.
    """
    name = formats[given.ConsumeIntInRange(0, len(formats) - 1)]
    kinds = sorted(ROWS[name].kinds)
    kind = kinds[given.ConsumeIntInRange(0, len(kinds) - 1)]
    subject, seeds = _seeds(name, kind)
    image = seeds[given.ConsumeIntInRange(0, len(seeds) - 1)].copy()
    for _ in range(given.ConsumeIntInRange(1, _MOST_EDITS)):
        _edit(given, image.numbered(given.ConsumeIntInRange(0, len(image.further))).data)
    use(subject, image, random.Random(1))
    return f"{name} {kind}"


@cache
def _seeds(name: str, kind: str) -> tuple[Subject, list[MemoryFile]]:
    subject = ROWS[name].subject(kind)
    return subject, list(subject.seeds(random.Random(1)))


def _edit(given: Input, data: bytearray) -> None:
    if not data:
        return
    if given.ConsumeIntInRange(0, 15) == 0:
        del data[given.ConsumeIntInRange(0, len(data) - 1) :]
        return
    # Headers and tables lie at the start, and some formats have a footer.
    reach = (512, 4096, 65536, len(data))[given.ConsumeIntInRange(0, 3)]
    width = _WIDTHS[given.ConsumeIntInRange(0, 3)]
    at = given.ConsumeIntInRange(0, min(reach, len(data)) - 1) // width * width
    if given.ConsumeIntInRange(0, 7) == 0:
        at = max(0, len(data) - width - at)
    if given.ConsumeIntInRange(0, 1):
        value = EDGES[given.ConsumeIntInRange(0, len(EDGES) - 1)]
    else:
        value = given.ConsumeIntInRange(0, (1 << 32) - 1)
    order = "big" if given.ConsumeIntInRange(0, 1) else "little"
    end = min(at + width, len(data))
    data[at:end] = (value % (1 << 8 * width)).to_bytes(width, order)[: end - at]
