"""The long matrix of faults, races and mutated images: `make torture`, or a part of it.

    python -m tests.faults --what operations --only qcow aes --seeds 100 --steps 400

A failure names what is wrong and the words that repeat it. The exit status is the number of failures, at most 100.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.faults import entries, interposer, mutated, nbd_streams, one_by_one, operations, races, scenes
from tests.faults.broken import BREAKS

WHATS = ("operations", "one-by-one", "entries", "stripes", "granules", "mutated", "nbd")

#: What one run does: operations on an image, operations of each thread, images.
_STEPS = {
    "operations": 250,
    "one-by-one": 12,
    "entries": 1,
    "stripes": 600,
    "granules": 600,
    "mutated": 300,
    "nbd": 200,
}

_MEMORY_BYTES = 3 << 30


class Job(NamedTuple):
    """One run. Mutated images and streams of NBD clients have no kind."""

    what: str
    kind: str
    seed: int
    steps: int

    @property
    def command(self) -> str:
        """What repeats it."""
        only = f"--only {self.kind} " if self.kind else ""
        return (
            f"python -m tests.faults --what {self.what} {only}--first-seed {self.seed} --seeds 1 --steps {self.steps}"
        )


def main(words: list[str]) -> int:
    """Run the jobs, in several processes if asked to."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--what", choices=WHATS, nargs="+", default=list(WHATS))
    parser.add_argument("--only", metavar="KIND", choices=[*scenes.KINDS, *entries.ENTRIES], nargs="+")
    parser.add_argument("--first-seed", metavar="N", type=int, default=0)
    parser.add_argument("--seeds", metavar="N", type=int, default=30, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--steps", metavar="N", type=int, help="operations of a run, or images")
    parser.add_argument("--break", dest="broken", choices=BREAKS, help="put a fault into tapfs first: runs must fail")
    parser.add_argument("--until-failure", action="store_true", help="stop at the first run that fails")
    parser.add_argument("--processes", metavar="N", type=int, default=1)
    parser.add_argument("--seconds", metavar="S", type=float, help="begin runs for so long, whatever --seeds says")
    parser.add_argument("--counts", metavar="FILE", type=Path, help="write there as JSON what was done")
    parser.add_argument("--part", metavar="N", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    arguments.only = arguments.only or list(scenes.KINDS)
    if not interposer.is_loaded():
        return _with_interposer(arguments.processes, words, arguments.counts)
    if arguments.broken is not None:
        BREAKS[arguments.broken]()
    end = None if arguments.seconds is None else time.monotonic() + arguments.seconds
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    failures, runs = 0, 0
    for job in itertools.islice(_jobs(arguments), arguments.part, None, arguments.processes):
        if end is not None and time.monotonic() > end:
            break
        interposer.folder().joinpath(f"job-{arguments.part}").write_text(job.command, encoding="utf-8")
        failures += not _succeeds(job)
        runs += 1
        if failures and arguments.until_failure:
            break
    counts = {"runs": runs, **interposer.loaded().counts()}
    interposer.folder().joinpath(f"counts-{arguments.part}").write_text(json.dumps(counts), encoding="utf-8")
    return min(failures, 100)


def _with_interposer(processes: int, words: list[str], counts: Path | None) -> int:
    with tempfile.TemporaryDirectory() as folder:
        environment = interposer.environment(interposer.build(Path(folder)))
        command = [sys.executable, "-m", "tests.faults", *words]
        workers = [
            subprocess.Popen([*command, "--part", str(part)], env=environment, cwd=interposer.REPOSITORY)
            for part in range(processes)
        ]
        failures = 0
        for part, worker in enumerate(workers):
            code = worker.wait()
            if code < 0:  # by a fault of memory above all; the runs that this worker had left are not done
                job = Path(folder, f"job-{part}").read_text(encoding="utf-8")
                sys.stdout.write(f"FAILED by {signal.Signals(-code).name}: {job}\n")
            failures += abs(code)
        if counts is not None:
            found = [json.loads(each.read_text(encoding="utf-8")) for each in Path(folder).glob("counts-*")]
            total = sum(map(Counter[str], found), Counter[str]())
            counts.write_text(json.dumps({**total, "failures": failures}), encoding="utf-8")
    sys.stdout.write("all is well\n" if failures == 0 else "there were failures\n")
    return min(failures, 100)


def _jobs(arguments: argparse.Namespace) -> Iterator[Job]:
    seeds: range | itertools.count[int] = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    if arguments.seconds is not None:
        seeds = itertools.count(arguments.first_seed)
    for seed in seeds:
        for what in arguments.what:
            for kind in _kinds(what, arguments.only):
                yield Job(what, kind, seed, arguments.steps or _STEPS[what])


def _kinds(what: str, only: list[str]) -> list[str]:
    if what == "entries":
        return [name for name in entries.ENTRIES if name in only or set(only) >= set(scenes.KINDS)]
    return [""] if what in {"mutated", "nbd"} else only


def _succeeds(job: Job) -> bool:
    with tempfile.TemporaryDirectory(prefix="tapfs-faults-", dir=os.environ.get("TMPDIR")) as folder:
        try:
            said = _run(job, Path(folder))
        except Exception:  # noqa: BLE001  whatever it is, the other runs go on
            sys.stdout.write(f"{traceback.format_exc()}FAILED: {job.command}\n")
            return False
    sys.stdout.write(f"{job.what} {job.kind} {job.seed}: {said}\n")
    sys.stdout.flush()
    return True


def _run(job: Job, folder: Path) -> str:
    match job.what:
        case "operations":
            return operations.run(interposer.loaded(), job.kind, job.seed, job.steps, folder)
        case "one-by-one":
            said, _ = one_by_one.run(interposer.loaded(), job.kind, job.seed, job.steps, folder)
            return said
        case "entries":
            said, _ = entries.run(interposer.loaded(), job.kind, folder)
            return said
        case "nbd":
            return nbd_streams.run(job.seed, job.steps, folder)
        case "mutated":
            return mutated.run(job.seed, job.steps, folder)
        case _:
            ownership = races.Ownership(job.what)
            return races.run(interposer.loaded(), job.kind, job.seed, ownership, job.steps, folder)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
