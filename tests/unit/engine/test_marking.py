"""The marks of a check: the engine's function and Python's do the same, whatever the words are."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapfs import marking
from tapfs.disk.chain import OpenOptions
from tapfs.jobs.check import check_image
from tapfs.kernel import marking as by_engine
from tapfs.marking import Marked
from tests.scattered_images import scattered_qcow

UNIT_BITS = 12
UNITS = 40

Marking = Callable[[bytes, int, bytearray], Marked | None]


def packed(*words: int) -> bytes:
    return struct.pack(f">{len(words)}Q", *words)


@pytest.mark.parametrize("mark", [marking.in_python, by_engine.mark_units])
def test_each_named_unit_is_marked_and_the_words_are_counted(mark: Marking) -> None:
    marks = bytearray(UNITS)
    assert mark(packed(0, 3 << 12, 0, 39 << 12, 3 << 12), UNIT_BITS, marks) == Marked(3, 39 << 12)
    assert [number for number, value in enumerate(marks) if value] == [3, 39]
    assert mark(packed(0, 0), UNIT_BITS, marks) == mark(b"", UNIT_BITS, marks) == Marked(0, 0)


@pytest.mark.parametrize("mark", [marking.in_python, by_engine.mark_units])
@pytest.mark.parametrize("word", [UNITS << 12, (3 << 12) + 512, 1, 1 << 63 | 1 << 12, (1 << 64) - 1])
def test_a_word_without_a_mark_or_inside_a_unit_is_refused(mark: Marking, word: int) -> None:
    assert mark(packed(1 << 12, word, 2 << 12), UNIT_BITS, bytearray(UNITS)) is None


@given(st.lists(st.sampled_from([0, 0, 1 << 12, 2 << 12, 39 << 12, 40 << 12, 4097]) | st.integers(0, (1 << 64) - 1)))
def test_both_functions_do_the_same(words: list[int]) -> None:
    python, engine = bytearray(UNITS), bytearray(UNITS)
    expected = marking.in_python(packed(*words), UNIT_BITS, python)
    assert by_engine.mark_units(packed(*words), UNIT_BITS, engine) == expected
    if expected is not None:
        assert engine == python


def test_half_a_word_is_refused() -> None:
    with pytest.raises(ValueError, match="no whole words"):
        marking.mark_units(bytes(12), UNIT_BITS, bytearray(UNITS))


def test_a_check_marks_by_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(marking, "_mark", marking.in_python)
    scattered_qcow(tmp_path / "image", 1 << 20, 20)
    assert check_image(str(tmp_path / "image"), OpenOptions()).allocated_bytes == 20 << 12
    assert marking._mark is by_engine.mark_units
