"""Ranges without others: against sets of bytes."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from tapfs.extent import Range, without

#: Where ranges begin and end: of two neighbours in the sorted list one is a range, or both are and touch.
BORDERS = st.lists(st.integers(0, 60), unique=True, max_size=14).map(sorted)


def ranges_between(borders: list[int], chosen: list[bool]) -> list[Range]:
    return [Range(start, stop - start) for (start, stop), own in zip(pairwise(borders), chosen, strict=False) if own]


@given(BORDERS, st.lists(st.booleans(), min_size=14), BORDERS, st.lists(st.booleans(), min_size=14))
def test_what_is_taken_is_not_there_and_all_else_is(
    borders: list[int], chosen: list[bool], taken_borders: list[int], taken_chosen: list[bool]
) -> None:
    ranges, taken = ranges_between(borders, chosen), ranges_between(taken_borders, taken_chosen)
    rest = list(without(ranges, taken))
    assert [byte for each in rest for byte in range(each.offset, each.end)] == sorted(
        {byte for each in ranges for byte in range(each.offset, each.end)}
        - {byte for each in taken for byte in range(each.offset, each.end)}
    )
    assert all(each.length > 0 for each in rest)
