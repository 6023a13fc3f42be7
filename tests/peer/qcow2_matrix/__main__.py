"""The matrix of qcow2 images against QEMU 10: the part of `make torture` that needs a peer.

    python -m tests.peer.qcow2_matrix --seeds 200 --first-seed 0 --processes 2

A failure names the kind of image, what was done to it, and the words that repeat it. The exit status is the number of
failures, at most 100.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from tests.many_runs import Done, Job, failures
from tests.peer.newest_qemu import newest_qemu
from tests.peer.qcow2_matrix.run import run

PROGRAM = "python -m tests.peer.qcow2_matrix"


def jobs(turns: int, programs: Path | None, seeds: Iterable[int]) -> Iterator[Job]:
    """An image for each seed, with so many turns."""
    for seed in seeds:
        again = f"{PROGRAM} --seeds 1 --turns {turns} --first-seed {seed}"
        yield Job(str(seed), again, partial(_run, seed, turns, programs))


def _run(seed: int, turns: int, programs: Path | None, folder: Path) -> Done:
    return Done(run(str(seed), turns, programs, folder), {"turns": turns})


def main(words: list[str]) -> int:
    """Run the seeds, in several processes if asked to."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--first-seed", metavar="N", type=int, default=0)
    parser.add_argument("--seeds", metavar="N", type=int, default=300, help="images (default: %(default)s)")
    parser.add_argument(
        "--turns", metavar="N", type=int, default=8, help="changes of each image (default: %(default)s)"
    )
    parser.add_argument("--system", action="store_true", help="with the system's QEMU instead of that of the backports")
    parser.add_argument("--processes", metavar="N", type=int, default=1)
    arguments = parser.parse_args(words)
    programs = None if arguments.system else Path(newest_qemu("qemu-img")).parent
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    return failures(jobs(arguments.turns, programs, seeds), arguments.processes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
