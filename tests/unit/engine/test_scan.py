"""Looking at memory: zeros, data, differences."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from tapfs.kernel.engine import find_data, first_difference, is_zero
from tests.unit.engine.engine_disks import pattern


def test_one_byte_anywhere_is_data() -> None:
    for length in (1, 7, 127, 128, 129, 1000):
        assert is_zero(bytes(length))
        for place in range(length):
            data = bytearray(length)
            data[place] = 0x80
            assert not is_zero(data), (length, place)
    assert is_zero(b"")


def test_zeros_are_found_at_any_address() -> None:
    data = memoryview(bytes(300) + b"x")
    for start in range(64):
        assert is_zero(data[start:300])
        assert not is_zero(data[start:])


@given(
    granule=st.sampled_from([1, 3, 64, 512]),
    granules=st.lists(st.booleans(), max_size=40),
    tail=st.integers(0, 511),
)
def test_runs_of_data_are_the_granules_that_hold_any(granule: int, granules: list[bool], tail: int) -> None:
    buffer = bytearray()
    for holds in granules:
        buffer += (b"\0" * (granule - 1) + b"\x01") if holds else bytes(granule)
    buffer += b"\x01" * (tail % granule)
    expected = bytearray(len(buffer))
    for start in range(0, len(buffer), granule):
        part = buffer[start : start + granule]
        if any(part):
            expected[start : start + len(part)] = b"\x01" * len(part)
    found = bytearray(len(buffer))
    runs = find_data(buffer, granule)
    for offset, length in runs:
        found[offset : offset + length] = b"\x01" * length
    assert found == expected
    assert all(left + length < right for (left, length), (right, _) in pairwise(runs))


def test_more_runs_than_one_call_returns() -> None:
    buffer = b"\x01\0" * 5000
    assert find_data(buffer, 1) == [(offset, 1) for offset in range(0, 10000, 2)]


def test_the_first_difference_is_found_wherever_it_is() -> None:
    data = pattern(10000)
    assert first_difference(data, bytes(data)) is None
    for place in (0, 1, 63, 64, 4095, 4096, 4097, 9999):
        other = bytearray(data)
        other[place] ^= 1
        other[-1] ^= 2
        assert first_difference(data, other) == min(place, 9999)
