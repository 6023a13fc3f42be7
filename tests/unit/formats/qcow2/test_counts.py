"""Refcounts of every width in a block, and the windows in which references are counted."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator

import pytest

from tapfs.formats.qcow2.counted_changes import lower_block, raise_block, sectors_of
from tapfs.formats.qcow2.counts import Counting
from tapfs.kernel import references
from tapfs.references import CountedBlock, CountedWindow, use_counter


def block_of(order: int, numbers: list[int]) -> bytes:
    """The numbers as the specification packs them: the first one in the lowest bits of a byte, or big-endian."""
    bits = 1 << order
    if bits >= 8:
        return b"".join(number.to_bytes(bits // 8, "big") for number in numbers)
    per_byte = 8 // bits
    packed = [numbers[at : at + per_byte] for at in range(0, len(numbers), per_byte)]
    return bytes(sum(number << bits * slot for slot, number in enumerate(some)) for some in packed)


@pytest.mark.parametrize("order", range(7))
def test_views_of_a_block(order: int) -> None:
    choice = random.Random(order)
    most = (1 << (1 << order)) - 1
    edges = [0, 1, 2, 255, 256, 257, 1 << 8, 1 << 16, 1 << 56, most]
    numbers = [min(choice.choice(edges), most) for _ in range(256)]
    raw, counting = block_of(order, numbers), Counting(order)
    assert list(counting.numbers(raw)) == numbers
    assert counting.packed(counting.numbers(raw)) == raw
    assert list(counting.capped(raw)) == [min(number, 255) for number in numbers]
    assert [byte != 0 for byte in counting.alone(raw)] == [number == 1 for number in numbers]
    assert [byte != 0 for byte in counting.used(raw)] == [number != 0 for number in numbers]
    assert [counting.get(raw, at) for at in range(256)] == numbers


def test_a_window_counts_in_two_bytes_when_one_is_not_enough() -> None:
    window = CountedWindow(1, 4, 30)
    assert (window.base, window.clusters) == (16, 14)
    window.add(20, 3, 200)
    window.add(21, 1, 54)
    assert (window.width, list(window.references(20, 23))) == (1, [200, 254, 200])
    window.add(21, 2, 1)
    assert (window.width, list(window.references(20, 23))) == (2, [200, 255, 201])
    window.add(22, 1, 70000)
    assert list(window.references(20, 23)) == [200, 255, 65535]


def test_a_window_knows_where_else_references_lead() -> None:
    window = CountedWindow(1, 4, 64)
    window.add(14, 4, 1)
    window.add(40, 1, 1)
    assert window.others == {0, 2}
    assert list(window.references(16, 19)) == [1, 1, 0]


@pytest.fixture(params=["Python", "the engine"])
def _changed_by(request: pytest.FixtureRequest) -> Iterator[None]:
    use_counter(None)
    if request.param == "the engine":
        references.use_engine()
    yield
    references.use_engine()


@pytest.mark.usefixtures("_changed_by")
@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("order", range(7))
def test_counts_of_a_block_are_raised_and_lowered(order: int, width: int) -> None:
    choice = random.Random(10 * order + width)
    most, many = (1 << (1 << order)) - 1, 16384 >> order
    numbers = [choice.choice([0, 1, 2, 5, 300, most]) % (most + 1) for _ in range(many)]
    times = [choice.choice([0, 0, 0, 1, 2, 254 if width == 1 else 1000]) for _ in range(many)]
    block = CountedBlock(3, array("B" if width == 1 else "H", times).tobytes(), width)
    counting, raw = Counting(order), array("B", block_of(order, numbers))
    sectors = sectors_of(raw)
    freed = lower_block(counting, raw, block, sectors)
    lowered = [max(0, number - less) for number, less in zip(numbers, times, strict=True)]
    assert list(counting.numbers(raw.tobytes())) == lowered
    gone = [bool(number and not left) for number, left in zip(numbers, lowered, strict=True)]
    assert list(map(bool, freed)) == gone
    per_sector = 4096 >> order
    changed = {at // per_sector for at in range(many) if numbers[at] != lowered[at]}
    assert {at for at, mark in enumerate(sectors) if mark} == changed

    raw = array("B", block_of(order, numbers))
    wrong = (at for at in range(many) if times[at] and not 0 < numbers[at] <= most - times[at])
    first = next(wrong, many)
    assert raise_block(counting, raw, block, sectors_of(raw)) == first
    expected = [number + more for number, more in zip(numbers[:first], times, strict=False)] + numbers[first:]
    assert list(counting.numbers(raw.tobytes())) == expected
    sound = CountedBlock(0, array("B", [int(0 < number < most) for number in expected]).tobytes(), 1)
    assert raise_block(counting, raw, sound, sectors_of(raw)) == many
