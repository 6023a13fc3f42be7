"""Patterns of `tapfs.patterns` are those of `re`, compiled when they are first used."""

from __future__ import annotations

import re

import pytest

from tapfs.patterns import pattern


def test_it_finds_what_a_compiled_one_finds() -> None:
    lazy, compiled = pattern(r"(a+)b", re.IGNORECASE), re.compile(r"(a+)b", re.IGNORECASE)
    for text in ("xAAb", "ab", "b"):
        for _ in range(2):
            found, wanted = lazy.search(text), compiled.search(text)
            assert (found and found.groups()) == (wanted and wanted.groups())
    assert lazy.sub("-", "aabAB") == compiled.sub("-", "aabAB")
    assert lazy.pattern == compiled.pattern


def test_bytes_are_searched_by_a_pattern_of_bytes() -> None:
    assert [found.span() for found in pattern(rb"\0+").finditer(b"a\0\0b\0")] == [(1, 3), (4, 5)]


def test_nothing_is_compiled_before_it_is_used() -> None:
    broken = pattern("(")
    with pytest.raises(re.error):
        broken.match("")
