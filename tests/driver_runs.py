"""Long runs of the kit over the rows of drivers: the part of `make torture` that needs no engine.

    python -m tests.driver_runs --only qcow2 vhdx --seeds 100 --first-seed 0 --processes 2

The exit status is the number of failures, at most 100.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator

from tapfs.testing import crash, operations
from tests.driver_rows import ROWS
from tests.many_runs import Done, Job, failures, seeded

PROGRAM = "python -m tests.driver_runs"
#: Requests, or crashes, of one run.
_SUITES = {"operations": 200, "crash": 150}


def _run(suite: str, name: str, kind: str, seed: int) -> Done:
    subject, amount = ROWS[name].subject(kind), _SUITES[suite]
    if suite == "crash":
        outcome = crash.crash_often(subject, seed, amount)
        return Done(f"{outcome.crashes} crashes in {outcome.epochs} epochs", {"crash points": outcome.crashes})
    return Done(operations.run(subject, seed, amount), {"requests": amount})


def jobs(suites: Iterable[str], names: Iterable[str], seeds: Iterable[int], only: str | None = None) -> Iterator[Job]:
    """Runs of every kind of image of the formats `names`, or of the kind `only`, one seed after the other."""
    for seed in seeds:
        for name in names:
            for kind in ROWS[name].kinds:
                for suite in suites:
                    if only in {None, kind} and (suite != "crash" or kind not in ROWS[name].torn):
                        again = f"{PROGRAM} --suite {suite} --only {name} --kind '{kind}' --first-seed {seed} --seeds 1"
                        yield Job(f"{suite} {name} {kind} {seed}", again, seeded(_run, suite, name, kind, seed))


def main(words: list[str]) -> int:
    """Run the seeds."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="FORMAT", choices=ROWS, nargs="+", default=list(ROWS))
    parser.add_argument("--kind", metavar="KIND", help="only this kind of image")
    parser.add_argument("--suite", choices=_SUITES, nargs="+", default=list(_SUITES))
    parser.add_argument("--first-seed", metavar="N", type=int, default=0)
    parser.add_argument("--seeds", metavar="N", type=int, default=20, help="of each kind (default: %(default)s)")
    parser.add_argument("--processes", metavar="N", type=int, default=1)
    arguments = parser.parse_args(words)
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    return failures(jobs(arguments.suite, arguments.only, seeds, arguments.kind), arguments.processes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
