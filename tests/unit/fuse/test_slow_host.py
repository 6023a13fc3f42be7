"""The FUSE server on a host that answers when it is told to, as a program in C, under the sanitizers.

A transfer that waits for the host must not keep other requests from it, nor `ls` from its answer.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.native_programs import MEMORY, THREADS, program

pytestmark = pytest.mark.native


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [
        program(tmp_path_factory.mktemp("slow"), "fuse_slow_host", sanitizer=sanitizer)
        for sanitizer in (THREADS, MEMORY)
    ]


# t: a host that cannot tell whether a transfer waits (no RWF_NOWAIT).


@pytest.mark.parametrize("options", [[], ["t"]], ids=["tells", "cannot tell"])
@pytest.mark.parametrize("scenario", ["reads", "writes", "many", "stop", "gone"])
def test_slow_host(programs: list[Path], tmp_path: Path, scenario: str, options: list[str]) -> None:
    for each in programs:
        job = [each, scenario, tmp_path / "disk", *options]
        done = subprocess.run(job, capture_output=True, text=True, check=False, timeout=300)
        assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", ""), each
