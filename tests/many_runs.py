"""Many runs in several processes, each told in a line, a failure with the words that repeat it."""

from __future__ import annotations

import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import NamedTuple


class Done(NamedTuple):
    """The result of a run that counts: what it says of itself, and how often it did what."""

    said: str
    counts: Mapping[str, int]


class Job(NamedTuple):
    """One run: what it is called, the words that repeat it, and a function of a folder that says what was done."""

    name: str
    command: str
    run: Callable[[Path], str | Done]


class Tally(NamedTuple):
    """The runs that were made, those that failed, and the sum of what they counted."""

    runs: int
    failures: int
    counts: Counter[str]


def failures(jobs: Iterable[Job], processes: int) -> int:
    """Run all of them; how many failed, at most 100, for an exit status."""
    return min(100, run_all(jobs, processes).failures)


def run_all(jobs: Iterable[Job], processes: int, seconds: float | None = None, enough: int | None = None) -> Tally:
    """Run all of them, or those of them that begin in so many seconds and before `enough` is counted."""
    end = None if seconds is None else time.monotonic() + seconds
    runs, failed, counts, left = 0, 0, Counter[str](), iter(jobs)
    waiting: set[Future[Mapping[str, int] | None]] = set()
    with ProcessPoolExecutor(processes) as pool:
        while True:
            while len(waiting) < 2 * processes:
                if (end is not None and time.monotonic() >= end) or (enough is not None and counts.total() >= enough):
                    break
                job = next(left, None)
                if job is None:
                    break
                waiting.add(pool.submit(_counts, job))
            if not waiting:
                return Tally(runs, failed, counts)
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for each in done:
                counted = each.result()
                runs += 1
                failed += counted is None
                counts.update(counted or {})


def _counts(job: Job) -> Mapping[str, int] | None:
    """Do a run; what it counted, or None where it failed."""
    counts: Mapping[str, int] | None = {}
    with tempfile.TemporaryDirectory(prefix="tapfs-runs-", dir=os.environ.get("TMPDIR")) as folder:
        try:
            said = job.run(Path(folder))
            if isinstance(said, Done):
                said, counts = said
        except Exception:  # noqa: BLE001  whatever it is, the other runs go on
            counts = None
            said = f"{traceback.format_exc()}FAILED: {job.command}"
    sys.stdout.write(f"{job.name}: {said}\n")
    sys.stdout.flush()
    return counts


def seeded(run: Callable[..., str | Done], *words: object) -> Callable[[Path], str | Done]:
    """A run that needs no folder, with its words."""
    return partial(_without_folder, run, words)


def _without_folder(run: Callable[..., str | Done], words: tuple[object, ...], folder: Path) -> str | Done:
    del folder
    return run(*words)
