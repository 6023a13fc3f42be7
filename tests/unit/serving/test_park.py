"""The park of the native front ends as a program in C: linked of kernel/src/serving alone, under the sanitizers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.native_programs import MEMORY, THREADS, program

pytestmark = pytest.mark.native


@pytest.mark.parametrize("sanitizer", [THREADS, MEMORY])
def test_park_alone(tmp_path: Path, sanitizer: str) -> None:
    job = program(tmp_path, "park_alone", sanitizer=sanitizer, parts=["serving"])
    done = subprocess.run([job], capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")
