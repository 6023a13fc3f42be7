"""The check of qcow2 by the engine against the one in Python: both say the same of any damaged image."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tapfs.driver import CheckReport, OpenRequest
from tapfs.errors import ImageError
from tapfs.formats.qcow2 import FORMAT, check, tally
from tapfs.kernel.references import EngineCounter
from tapfs.references import use_counter
from tapfs.testing.hostile import EDGES, damage
from tapfs.testing.model import MemoryFile
from tests.qcow2_images import COPIED, KINDS, Fields, make

SIZE = 1_500_000 // 512 * 512 + 512
SEEDS = 18


@pytest.fixture(autouse=True)
def in_python_again() -> Iterator[None]:
    yield
    use_counter(None)


def spoil_entries(image: bytearray, choice: random.Random) -> None:
    """Change words of L2 tables and of refcount blocks, which random damage seldom hits."""
    fields = Fields(bytes(image))
    tables = [fields.number(fields.l1_at + 8 * index, 8) & ~COPIED for index in range(fields.l1_entries)]
    places = [place for place in tables if place] + [fields.number(fields.reftable_at, 8)]
    used = [at for place in places for at in range(place, place + fields.cluster, 8) if any(image[at : at + 8])]
    for _ in range(choice.choice([1, 1, 2, 4])):
        at = choice.choice(used) if choice.random() < 0.7 else choice.choice(places) + 8 * choice.randrange(64)
        other = choice.choice(places) + 8 * choice.randrange(fields.cluster // 8)
        what = choice.random()
        if what < 0.2:
            image[at] ^= 0x80  # "owned alone"
        elif what < 0.4:
            image[at + choice.randrange(8)] ^= 1 << choice.randrange(8)
        elif what < 0.6:
            count = 8 * choice.choice([1, 2, 30])
            image[at : at + count] = image[other : other + count]
        elif what < 0.7:  # more references to one cluster than a byte counts
            start = at - at % fields.cluster
            count = min(400, fields.cluster // 8)
            image[start : start + 8 * count] = image[at : at + 8] * count
        else:
            number = choice.choice([*EDGES, COPIED | choice.randrange(len(image)), 1 << 62 | choice.randrange(1 << 60)])
            image[at : at + 8] = (number % (1 << 64)).to_bytes(8, "big")


def spoiled(kind: str, seed: int) -> bytes:
    choice = random.Random(f"{kind} {seed}")
    image = bytearray(make(kind, SIZE, seed % 4)[0].data)
    if seed % 3:
        spoil_entries(image, choice)
    if seed % 3 == 2:
        damage(image, choice)
    return bytes(image)


def report_of(image: bytes) -> CheckReport | str:
    try:
        return FORMAT.open(MemoryFile(image), OpenRequest(lenient=True)).check()
    except ImageError as error:
        return str(error)


@pytest.mark.parametrize("kind", KINDS)
def test_both_find_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = 0
    for seed in range(SEEDS):
        image = spoiled(kind, seed)
        # Small windows, so that a file has many.
        bits = random.Random(seed).choice([tally.WINDOW_BITS, 3, 6])
        monkeypatch.setattr(tally, "WINDOW_BITS", bits)
        monkeypatch.setattr(check, "WINDOW_BITS", bits)
        use_counter(None)
        in_python = report_of(image)
        use_counter(EngineCounter)
        assert report_of(image) == in_python, f"{kind} {seed}"
        monkeypatch.undo()
        found += isinstance(in_python, CheckReport) and in_python.corruptions > 0
    assert found > SEEDS // 8
