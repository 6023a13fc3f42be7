"""Many runs in several processes, each told in a line, a failure with the words that repeat it."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple


class Job(NamedTuple):
    """One run: what it is called, the words that repeat it, and a function of a folder that says what was done."""

    name: str
    command: str
    run: Callable[[Path], str]


def failures(jobs: Iterable[Job], processes: int) -> int:
    """Run all of them; how many failed, at most 100, for an exit status."""
    with ProcessPoolExecutor(processes) as pool:
        return min(100, sum(pool.map(_fails, jobs)))


def _fails(job: Job) -> bool:
    failed = False
    with tempfile.TemporaryDirectory(prefix="tapfs-runs-", dir=os.environ.get("TMPDIR")) as folder:
        try:
            said = job.run(Path(folder))
        except Exception:  # noqa: BLE001  whatever it is, the other runs go on
            failed = True
            said = f"{traceback.format_exc()}FAILED: {job.command}"
    sys.stdout.write(f"{job.name}: {said}\n")
    sys.stdout.flush()
    return failed


def seeded(run: Callable[..., str], *words: object) -> Callable[[Path], str]:
    """A run that needs no folder, with its words."""
    return partial(_without_folder, run, words)


def _without_folder(run: Callable[..., str], words: tuple[object, ...], folder: Path) -> str:
    del folder
    return run(*words)
