"""Rings of io_uring do what the engine needs of them, and the kernel refuses all else."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.native_programs import MEMORY, MOVER_FOLDERS, program


def test_a_ring_moves_bytes_of_files_and_no_more(tmp_path: Path) -> None:
    job = program(tmp_path, "ring_use", sanitizer=MEMORY, parts=MOVER_FOLDERS)
    done = subprocess.run([job], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")
