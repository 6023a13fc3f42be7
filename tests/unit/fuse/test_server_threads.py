"""The engine and its FUSE server under ThreadSanitizer, and under AddressSanitizer, as a program in C."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.native_programs import MEMORY, THREADS, require_no_report, require_race_is_seen

pytestmark = pytest.mark.native
NAMES = ("fuse_server_threads", "owned_disk")


@pytest.mark.parametrize("sanitizer", [THREADS, MEMORY])
def test_no_report(tmp_path: Path, sanitizer: str) -> None:
    require_no_report(tmp_path, *NAMES, sanitizer=sanitizer, rounds=1500)


def test_a_race_would_be_reported(tmp_path: Path) -> None:
    """The same with the mutex of the map cache taken away: the test can fail."""
    calls = ("pthread_mutex_lock(&cache->mutex);", "pthread_mutex_unlock(&cache->mutex);")
    require_race_is_seen(tmp_path, *NAMES, source="engine/cache.c", without=calls)
