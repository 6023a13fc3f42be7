"""Torture tapfs for so many seconds and count what was done: `make torture`, or a part of it.

    TORTURE_SECONDS=600 python -m tests.torture --only crash faults

The parts share the time. Their files lie in a file system in memory, where there can be one. The numbers go to
build/torture/numbers.json, where those of a part that does not run stay; `python -m tests.torture.report` makes the
table of docs/reliability.md of them. A failure prints the words that repeat it. The exit status is 1 if one failed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from scripts.run_suite import suite_disk
from tests.conftest import REPOSITORY
from tests.torture.numbers import Record, machine, now, read, write
from tests.torture.parts import PARTS, Budget, Part


def main(words: list[str]) -> int:
    """Run the parts one after the other."""
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(
        prog="python -m tests.torture", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    seconds = float(os.environ.get("TORTURE_SECONDS", "3600"))
    parser.add_argument("--seconds", metavar="S", type=float, default=seconds, help="for all (default: %(default)g)")
    parser.add_argument("--only", metavar="PART", choices=names, nargs="+", default=names, help=", ".join(names))
    parser.add_argument("--processes", metavar="N", type=int, default=os.cpu_count())
    parser.add_argument(
        "--enough", metavar="N", type=int, help="a part of single runs ends when it has counted so many"
    )
    parser.add_argument("--first-seed", metavar="N", type=int, help="(default: by the time, so that each run is new)")
    parser.add_argument("--folder", metavar="DIR", type=Path, default=REPOSITORY / "build/torture")
    arguments = parser.parse_args(words)
    first_seed = int(time.time()) if arguments.first_seed is None else arguments.first_seed
    arguments.folder.mkdir(parents=True, exist_ok=True)
    chosen = [part for part in PARTS if part.name in arguments.only]
    shares = sum(part.share for part in chosen)
    with suite_disk() as disk:
        if disk is not None:
            os.environ["TMPDIR"] = str(disk / "tmp")
            tempfile.tempdir = None
        return min(1, sum(_failures(part, arguments, first_seed, shares) for part in chosen))


def _failures(part: Part, arguments: argparse.Namespace, first_seed: int, shares: int) -> int:
    """Run a part for its share and keep what it counted; how many of its runs failed."""
    share = arguments.seconds * part.share / shares
    begin = time.monotonic()
    tally = part.run(Budget(share, arguments.processes, first_seed, arguments.folder, arguments.enough))
    taken = time.monotonic() - begin
    record = Record(now(), machine(), arguments.processes, round(taken), tally.runs, tally.failures, dict(tally.counts))
    write(arguments.folder / "numbers.json", read(arguments.folder / "numbers.json") | {part.name: record})
    counts = ", ".join(f"{number} {what}" for what, number in sorted(tally.counts.items()))
    sys.stdout.write(f"{part.name}: {tally.runs} runs, {tally.failures} failures, {counts} in {taken:.0f} s\n")
    sys.stdout.flush()
    return tally.failures


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
