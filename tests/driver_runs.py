"""Long runs of the kit over the rows of drivers: the part of `make torture` that needs no engine.

    python -m tests.driver_runs --only qcow2 vhdx --seeds 100 --first-seed 0 --processes 2

The exit status is the number of failures, at most 100.
"""

from __future__ import annotations

import argparse
import sys

from tapfs.testing import crash, operations
from tests.driver_rows import ROWS
from tests.many_runs import Job, failures, seeded

_SUITES = {"operations": (operations.run, 200), "crash": (crash.run, 150)}


def _run(suite: str, name: str, kind: str, seed: int) -> str:
    run, amount = _SUITES[suite]
    return run(ROWS[name].subject(kind), seed, amount)


def main(words: list[str]) -> int:
    """Run the seeds."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.driver_runs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="FORMAT", choices=ROWS, nargs="+", default=list(ROWS))
    parser.add_argument("--kind", metavar="KIND", help="only this kind of image")
    parser.add_argument("--first-seed", metavar="N", type=int, default=0)
    parser.add_argument("--seeds", metavar="N", type=int, default=20, help="of each kind (default: %(default)s)")
    parser.add_argument("--processes", metavar="N", type=int, default=1)
    arguments = parser.parse_args(words)
    jobs = [
        Job(
            f"{suite} {name} {kind} {seed}",
            f"{parser.prog} --only {name} --kind '{kind}' --first-seed {seed} --seeds 1",
            seeded(_run, suite, name, kind, seed),
        )
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds)
        for name in arguments.only
        for kind in ROWS[name].kinds
        for suite in _SUITES
        if arguments.kind in {None, kind} and (suite != "crash" or kind not in ROWS[name].torn)
    ]
    return failures(jobs, arguments.processes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
