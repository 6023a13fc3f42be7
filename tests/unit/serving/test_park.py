"""The park of the native front ends as a program in C: linked of kernel/src/serving alone, under the sanitizers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

SOURCES = REPOSITORY / "kernel/src"


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_park_alone(tmp_path: Path, sanitizer: str) -> None:
    program = tmp_path / "park_alone"
    sources = [REPOSITORY / "tests/native/park_alone.c", *sorted((SOURCES / "serving").glob("*.c"))]
    command = ["gcc", "-D_GNU_SOURCE", "-std=gnu11", "-O1", "-g", f"-fsanitize={sanitizer}", f"-I{SOURCES}"]
    subprocess.run([*command, "-o", program, *sources, "-lpthread"], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")
