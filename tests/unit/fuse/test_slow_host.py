"""The FUSE server on a host that answers when it is told to, as a program in C, under the sanitizers.

A transfer that waits for the host must not keep other requests from it, nor `ls` from its answer.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

SOURCES = REPOSITORY / "kernel/src"


def built(folder: Path, sanitizer: str) -> Path:
    program = folder / "fuse_slow_host"
    command = ["gcc", "-D_GNU_SOURCE", "-std=gnu11", "-O1", "-g", f"-fsanitize={sanitizer}", "-o", program]
    command += [REPOSITORY / "tests/native/fuse_slow_host.c", f"-I{SOURCES}", *sorted(SOURCES.rglob("*.c"))]
    subprocess.run([*map(str, command), "-ldeflate", "-lcrypto", "-lz", "-lzstd", "-lpthread"], check=True)
    return program


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [built(tmp_path_factory.mktemp("slow"), sanitizer) for sanitizer in ("thread", "address,undefined")]


# t: a host that cannot tell whether a transfer waits (no RWF_NOWAIT).


@pytest.mark.parametrize("options", [[], ["t"]], ids=["tells", "cannot tell"])
@pytest.mark.parametrize("scenario", ["reads", "writes", "many", "stop", "gone"])
def test_slow_host(programs: list[Path], tmp_path: Path, scenario: str, options: list[str]) -> None:
    for program in programs:
        job = [program, scenario, tmp_path / "disk", *options]
        done = subprocess.run(job, capture_output=True, text=True, check=False, timeout=300)
        assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", ""), program
