"""The parts of `make torture`: each puts tapfs under one kind of fault for a time, and counts what it did."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tests import driver_runs
from tests.conftest import REPOSITORY
from tests.driver_rows import ROWS
from tests.faults import __main__ as faults
from tests.fuzz import decoders
from tests.many_runs import Done, Job, Tally, run_all
from tests.peer.differential import __main__ as differential
from tests.peer.newest_qemu import newest_qemu
from tests.peer.qcow2_damage import __main__ as damages
from tests.peer.qcow2_matrix import __main__ as matrix
from tests.torture import commands, hosts, power_failures
from tests.torture.refusing_host import HOSTS

#: What is freed stays with the process: an image of some MiB for each input is not mapped anew by the kernel.
_KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "1000000000"}
#: Of tests/faults: one call of the host, or one allocation, fails.
_ONE_BY_ONE = ("entries", "one-by-one")


class Budget(NamedTuple):
    """The means of one part: seconds, processes, the first seed, a folder for what it leaves, and how much is enough.

    A part of single runs begins no more of them once it has counted `enough`.
    """

    seconds: float
    processes: int
    first_seed: int
    folder: Path
    enough: int | None = None


class Part(NamedTuple):
    """One kind of fault: its name, its share of the time in percent, what a reader of the table is told, and itself."""

    name: str
    share: int
    about: str
    run: Callable[[Budget], Tally]


def of_jobs(jobs: Callable[[Iterator[int]], Iterator[Job]], budget: Budget) -> Tally:
    """Runs of jobs whose seeds go on for ever."""
    return run_all(jobs(itertools.count(budget.first_seed)), budget.processes, budget.seconds, budget.enough)


def _requests(budget: Budget) -> Tally:
    return of_jobs(partial(driver_runs.jobs, ["operations"], list(ROWS)), budget)


def _faults(budget: Budget) -> Tally:
    return _of_faults(budget, "--what", *(what for what in faults.WHATS if what not in _ONE_BY_ONE))


def _of_faults(budget: Budget, *what: str) -> Tally:
    counts = budget.folder / "faults.json"
    words = ["--seconds", str(budget.seconds), "--processes", str(budget.processes)]
    words += ["--first-seed", str(budget.first_seed), "--counts", str(counts), *what]
    subprocess.run([sys.executable, "-m", "tests.faults", *words], cwd=REPOSITORY, check=False)
    found = Counter[str](json.loads(counts.read_text(encoding="utf-8")))
    return Tally(found.pop("runs"), found.pop("failures", 0), found)


def _fuzz(name: str, chosen: list[str], budget: Budget) -> Tally:
    """Fuzz in processes that share what reached new code."""
    corpus = budget.folder / name
    seconds = str(max(1, int(budget.seconds)))
    words = [sys.executable, "-m", "tests.fuzz", *chosen, "--seconds", seconds, "--corpus", str(corpus)]
    fuzzers = [
        subprocess.Popen(
            [*words, "--", f"-seed={budget.first_seed + number + 1}"],
            cwd=REPOSITORY,
            env=os.environ | _KEPT_MEMORY,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        for number in range(budget.processes)
    ]
    inputs = failed = 0
    for fuzzer in fuzzers:
        _, said = fuzzer.communicate()
        done = re.search(r"^Done (\d+) runs", said, re.MULTILINE)
        inputs += int(done[1]) if done else 0
        if fuzzer.returncode != 0:
            failed += 1
            sys.stdout.write(f"{said[-4000:]}\nFAILED: {' '.join(words[1:4])} … {corpus}/crash-…\n")
    return Tally(len(fuzzers), failed, Counter({"inputs": inputs}))


def _of_writable(budget: Budget) -> Tally:
    return _fuzz("fuzz", [], budget)


def _of_read_only(budget: Budget) -> Tally:
    return _fuzz("readers", ["--read-only"], budget)


def _decoder(name: str, seconds: float, seed: int, corpus: Path, folder: Path) -> Done:
    """Build a decoder's program and run libFuzzer in its corpus, which begins with the inputs that are kept."""
    program = decoders.build(name, folder)
    decoders.unpack(name, corpus)
    done = decoders.fuzz(program, corpus, seconds, seed)
    assert done.failure is None, f"{done.failure[-4000:]}\nthe input is in {corpus}"
    return Done(f"{done.inputs} inputs", {"inputs": done.inputs})


def _decoders(budget: Budget) -> Tally:
    """Each program of tests/fuzz/native for its share of the time."""
    subprocess.run([REPOSITORY / "scripts/system-packages", "fuzz"], check=True)
    seconds = budget.seconds * budget.processes / len(decoders.DECODERS)
    again = "python -m tests.fuzz.decoders --only"
    found: list[Job] = []
    for name in decoders.DECODERS:
        run = partial(_decoder, name, seconds, budget.first_seed, budget.folder / "decoders" / name)
        found.append(Job(f"decoder {name}", f"{again} {name} --seed {budget.first_seed}", run))
    return run_all(found, budget.processes)


def _matrix(budget: Budget) -> Tally:
    return of_jobs(partial(matrix.jobs, 8, Path(newest_qemu("qemu-img")).parent), budget)


def _damages(budget: Budget) -> Tally:
    return of_jobs(partial(damages.jobs, Path(newest_qemu("qemu-img")).parent), budget)


def _differential(budget: Budget) -> Tally:
    """Batches by turns with QEMU 10 and with the system's, which read some images otherwise."""
    programs = Path(newest_qemu("qemu-storage-daemon")).parent

    def jobs(batches: Iterator[int]) -> Iterator[Job]:
        for batch in batches:
            yield from differential.jobs(programs if batch % 2 else None, [batch])

    return of_jobs(jobs, budget)


def _one_by_one(budget: Budget) -> Tally:
    return _of_faults(budget, "--what", *_ONE_BY_ONE)


def _calls(budget: Budget) -> Tally:
    """Every call of every command, in any order, until the time is over; the count of all is told beside."""
    with tempfile.TemporaryDirectory(prefix="tapfs-calls-") as folder:
        known = list(commands.jobs(commands.COMMANDS, Path(folder), 1.0, random.Random(budget.first_seed)))
    tally = run_all(known, budget.processes, budget.seconds, budget.enough)
    return tally._replace(counts=tally.counts + Counter({"known": len(known)}))


def _hosts(budget: Budget) -> Tally:
    """Every command on every other host, in any order, until the time is over."""
    known = hosts.jobs([*HOSTS, *hosts.OTHERS], commands.COMMANDS, 1.0, random.Random(budget.first_seed))
    return run_all(known, budget.processes, budget.seconds, budget.enough)


PARTS = (
    Part(
        "crash",
        24,
        "a power failure at any moment: drivers' plans, new sizes, commits and rebases of chains, every kind of image",
        partial(of_jobs, power_failures.jobs),
    ),
    Part("requests", 5, "random requests of a driver against a model", _requests),
    Part("faults", 8, "failing, cut and late calls of the host and refused memory under the engine", _faults),
    Part("engine", 8, "one call of the host, or one allocation, of the engine fails: each one by one", _one_by_one),
    Part("calls", 18, "one system call of a command, a mount or a server fails: each one by one", _calls),
    Part("hosts", 6, "commands on hosts that lack something, are full or read-only, and with clocks that jump", _hosts),
    Part("fuzz", 5, "inputs of atheris for open, map, check and repair of writable formats", _of_writable),
    Part("readers", 5, "the same for what is only read: formats, packed files, packages, file systems", _of_read_only),
    Part("decoders", 8, "inputs of libFuzzer for the engine's decoders, under sanitizers", _decoders),
    Part("matrix", 5, "qcow2 images that tapfs and QEMU change in turns", _matrix),
    Part("differential", 5, "mutated images of ten formats, read by tapfs and by QEMU", _differential),
    Part("damages", 3, "damaged qcow2 images: both checkers, and a repair", _damages),
)
