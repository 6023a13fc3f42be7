"""Threads of trio are asked for by the words that the trio of Debian 12 has, too."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import trio

from tapfs.serving import threads
from tests.conftest import REPOSITORY


@pytest.mark.parametrize("word", ["cancellable", "abandon_on_cancel"])
def test_either_name_of_the_choice_is_used(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    said: list[dict[str, Any]] = []

    async def run_sync(work: Any, **words: Any) -> Any:
        said.append(words)
        return work()

    monkeypatch.setattr(threads, "_ABANDONING", word)
    monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)
    assert trio.run(threads.in_thread, lambda: 1) == 1
    assert trio.run(threads.in_thread_alone, lambda: 2) == 2
    assert said == [{"limiter": None, word: False}, {word: True}]


def test_who_may_wait_for_the_event_loop_is_never_run_in_it() -> None:
    assert trio.run(threads.in_thread_alone, threading.get_ident) != threading.get_ident()


def test_no_other_module_says_a_name_of_the_choice() -> None:
    named = [path.name for path in (REPOSITORY / "tapfs").rglob("*.py") if "abandon_on_cancel" in path.read_text()]
    assert named == ["threads.py"]
