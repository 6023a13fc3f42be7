"""Edits of sound images, as a fuzzer gives them: an input says which image, and what is changed where.

So inputs are a few bytes each. Most edited images are sound but for a field, which gets them past the first checks.
"""

from __future__ import annotations

import random
from contextlib import suppress
from functools import cache
from typing import Protocol

from tapfs.disk.probe import format_named
from tapfs.driver import OpenRequest, SalvageableFormat, SalvageRequest
from tapfs.errors import ImageError
from tapfs.host.patched import patched_files
from tapfs.testing.hostile import EDGES, use
from tapfs.testing.model import MemoryFile
from tapfs.testing.subject import Subject
from tests.driver_rows import ROWS

MOST_EDITS = 8
#: So much of a salvaged disk is mapped, in pieces.
_MAPPED_BYTES, _PIECE = 16 << 20, 1 << 20
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
    for _ in range(given.ConsumeIntInRange(1, MOST_EDITS)):
        edit(given, image.numbered(given.ConsumeIntInRange(0, len(image.further))).data)
    use(subject, image, random.Random(1))
    _salvage(given, name, image)
    return f"{name} {kind}"


def _salvage(given: Input, name: str, image: MemoryFile) -> None:
    """Salvage some of the images, often without their start, and map what comes out. Raises what is no ImageError.

    A salvage reads the whole file, so it takes as long as all the rest.
    """
    found = format_named(name)
    if not isinstance(found, SalvageableFormat) or given.ConsumeIntInRange(0, 3):
        return
    if given.ConsumeIntInRange(0, 2) == 0:
        image.data[:512] = bytes(min(512, len(image.data)))
    request = SalvageRequest(
        virtual_size=given.ConsumeIntInRange(1, 1 << 40) if given.ConsumeIntInRange(0, 1) else None,
        cluster_bytes=None if given.ConsumeIntInRange(0, 3) else 1 << given.ConsumeIntInRange(0, 24),
        in_order=bool(given.ConsumeIntInRange(0, 1)),
    )
    with suppress(ImageError):
        plan = found.salvage(image, request).patch
        driver = found.open(patched_files([image], plan).get(0, image), OpenRequest(further=image))
        for offset in range(0, min(driver.geometry.virtual_size, _MAPPED_BYTES), _PIECE):
            with suppress(ImageError):
                driver.map(offset, min(_PIECE, driver.geometry.virtual_size - offset))


@cache
def _seeds(name: str, kind: str) -> tuple[Subject, list[MemoryFile]]:
    subject = ROWS[name].subject(kind)
    return subject, list(subject.seeds(random.Random(1)))


def edit(given: Input, data: bytearray) -> None:
    """Change a number of the bytes, or cut their end off, as an input says."""
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
