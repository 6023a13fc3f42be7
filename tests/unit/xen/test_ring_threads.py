"""A Xen device under ThreadSanitizer, and under AddressSanitizer and UBSan, as a program in C."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

SOURCES = REPOSITORY / "kernel/src"


def built(folder: Path, sanitizer: str) -> Path:
    program = folder / "xen_ring_threads"
    command = ["gcc", "-D_GNU_SOURCE", "-std=gnu11", "-O1", "-g", "-w", f"-fsanitize={sanitizer}", "-o", program]
    command += [REPOSITORY / "tests/native" / "xen_ring_threads.c", f"-I{SOURCES}", *sorted(SOURCES.rglob("*.c"))]
    subprocess.run([*map(str, command), "-ldeflate", "-lcrypto", "-lz", "-lzstd", "-lpthread"], check=True)
    return program


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_no_report(tmp_path: Path, sanitizer: str) -> None:
    """For each kind of grants, with io_uring (rounds are even) and without."""
    program = built(tmp_path, sanitizer)
    for grants, rounds in ((0, 300), (0, 301), (1, 301), (2, 301)):
        machine = tmp_path / f"machine-{grants}-{rounds}"
        machine.mkdir()
        command = [program, machine, tmp_path / "disk", str(grants), str(rounds)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")
