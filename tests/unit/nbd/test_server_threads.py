"""The engine and its NBD server under ThreadSanitizer, and under AddressSanitizer, as a program in C."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.native_programs import MEMORY, THREADS, require_no_report, require_race_is_seen

pytestmark = pytest.mark.native
NAMES = ("nbd_server_threads", "owned_disk")


@pytest.mark.parametrize("sanitizer", [THREADS, MEMORY])
def test_no_report(tmp_path: Path, sanitizer: str) -> None:
    require_no_report(tmp_path, *NAMES, sanitizer=sanitizer, rounds=1000)


def test_a_race_would_be_reported(tmp_path: Path) -> None:
    """The same with the lock of a loop's lists taken away where pieces are given back: the test can fail."""
    calls = ("pthread_mutex_lock(&loop->lock);", "pthread_mutex_unlock(&loop->lock);")
    require_race_is_seen(tmp_path, *NAMES, source="nbd/pieces.c", without=calls)
