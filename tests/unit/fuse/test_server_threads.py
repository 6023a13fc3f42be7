"""The engine and its FUSE server under ThreadSanitizer, and under AddressSanitizer, as a program in C."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.native_programs import MEMORY, SOURCES, THREADS, program

pytestmark = pytest.mark.native
NAMES = ("fuse_server_threads", "owned_disk")


@pytest.mark.parametrize("sanitizer", [THREADS, MEMORY])
def test_no_report(tmp_path: Path, sanitizer: str) -> None:
    job = program(tmp_path, *NAMES, sanitizer=sanitizer)
    done = subprocess.run([job, tmp_path / "disk", "1500"], capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


def test_a_race_would_be_reported(tmp_path: Path) -> None:
    """The same with the mutex of the map cache taken away: the test can fail."""
    text = (SOURCES / "engine/cache.c").read_text()
    for call in ("pthread_mutex_lock(&cache->mutex);", "pthread_mutex_unlock(&cache->mutex);"):
        assert call in text
        text = text.replace(call, "")
    broken = tmp_path / "cache.c"
    broken.write_text(text)
    racing = program(tmp_path, *NAMES, sanitizer=THREADS, instead=[broken])
    # At the first report: a program whose data such a race has spoilt may go round in circles.
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
    job = [racing, tmp_path / "disk", "300"]
    done = subprocess.run(job, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode != 0
    assert "ThreadSanitizer: data race" in done.stderr
