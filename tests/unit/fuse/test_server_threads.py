"""The engine and its FUSE server under ThreadSanitizer, and under AddressSanitizer, as a program in C."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

SOURCES = REPOSITORY / "kernel/src"


def built(folder: Path, sanitizer: str, *flags: str) -> Path:
    program = folder / "fuse_server_threads"
    command = ["gcc", "-D_GNU_SOURCE", "-std=gnu11", "-O1", "-g", f"-fsanitize={sanitizer}", *flags, "-o", program]
    command += [REPOSITORY / "tests/native" / "fuse_server_threads.c", f"-I{SOURCES}", *sorted(SOURCES.rglob("*.c"))]
    subprocess.run([*map(str, command), "-ldeflate", "-lcrypto", "-lz", "-lzstd", "-lpthread"], check=True)
    return program


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_no_report(tmp_path: Path, sanitizer: str) -> None:
    program = built(tmp_path, sanitizer)
    done = subprocess.run(
        [program, tmp_path / "disk", "1500"], capture_output=True, text=True, check=False, timeout=300
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


def test_a_race_would_be_reported(tmp_path: Path) -> None:
    """The same with the mutex of the map cache taken away: the test can fail."""
    broken = tmp_path / "broken"
    shutil.copytree(SOURCES, broken)
    cache = broken / "engine/cache.c"
    text = cache.read_text()
    for call in ("pthread_mutex_lock(&cache->mutex);", "pthread_mutex_unlock(&cache->mutex);"):
        assert call in text
        text = text.replace(call, "")
    cache.write_text(text)
    program = tmp_path / "program"
    harness = REPOSITORY / "tests/native" / "fuse_server_threads.c"
    command = ["gcc", "-D_GNU_SOURCE", "-std=gnu11", "-O1", "-g", "-fsanitize=thread", "-o", program, harness]
    command += [f"-I{broken}", *sorted(broken.rglob("*.c"))]
    subprocess.run([*map(str, command), "-ldeflate", "-lcrypto", "-lz", "-lzstd", "-lpthread"], check=True)
    # At the first report: a program whose data such a race has spoilt may go round in circles.
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
    job = [program, tmp_path / "disk", "300"]
    done = subprocess.run(job, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode != 0
    assert "ThreadSanitizer: data race" in done.stderr
