"""A sample of the part `readers` of `make torture`: damage by chance of every kind of what tapfs only reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tapfs.formats.ewf.driver import EwfDriver
from tests.fuzz import read_only
from tests.fuzz.edits import Numbers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("read-only")


@pytest.mark.parametrize("kind", read_only.KINDS)
def test_a_sample_of_each_kind_finds_nothing(kind: str, folder: Path) -> None:
    assert {read_only.try_one(Numbers(seed), [kind], folder) for seed in range(5)} == {kind}


def test_what_is_no_image_error_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def map_wrongly(self: EwfDriver, offset: int, length: int) -> Iterator[object]:
        raise IndexError

    monkeypatch.setattr(EwfDriver, "map", map_wrongly)
    with pytest.raises(IndexError):
        _try_many(folder)


def test_an_answer_without_an_end_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def map_for_ever(self: EwfDriver, offset: int, length: int) -> Iterator[object]:
        while True:
            pass

    monkeypatch.setattr(EwfDriver, "map", map_for_ever)
    monkeypatch.setattr(read_only, "MOST_SECONDS", 0.05)
    with pytest.raises(read_only.TooSlowError):
        _try_many(folder)


def _try_many(folder: Path) -> None:
    for seed in range(40):
        read_only.try_one(Numbers(seed), ["ewf"], folder)
