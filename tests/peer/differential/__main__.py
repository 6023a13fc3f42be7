"""Mutated images against QEMU: the part `differential` of `make torture`.

    python -m tests.peer.differential --only vmdk qcow2 --first-seed 0 --seeds 40 --processes 2

A seed is a batch of mutations of each format. A failure is a difference that no rule explains; it names the format and
the number of the mutation, which `--number` repeats. The exit status is the number of failures, at most 100.
"""

from __future__ import annotations

import argparse
import atexit
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.fuzz.read_only import quickly
from tests.many_runs import Done, Job, failures
from tests.peer.differential.daemon import Daemon
from tests.peer.differential.mutations import mutated
from tests.peer.differential.rules import rule_of
from tests.peer.differential.run import differences
from tests.peer.differential.seeds import FORMATS
from tests.peer.newest_qemu import newest_qemu

PROGRAM = "python -m tests.peer.differential"
BATCH = 20
#: Of the processor, for one image.
_MOST_SECONDS = 20.0


def jobs(programs: Path | None, batches: Iterable[int], names: Iterable[str] = FORMATS) -> Iterator[Job]:
    """Batches of mutations of each format, one batch after the other."""
    for batch in batches:
        for name in names:
            again = f"{PROGRAM} --only {name} --first-seed {batch} --seeds 1"
            numbers = range(batch * BATCH, (batch + 1) * BATCH)
            yield Job(f"{name} {batch}", again, partial(run, name, numbers, programs))


def run(name: str, numbers: Iterable[int], programs: Path | None, folder: Path) -> Done:
    """Try mutations of a format; raises AssertionError with those whose differences no rule explains."""
    del folder
    place, daemon = _daemon(programs)
    counts, left = Counter[str](), list[str]()
    for number in numbers:
        image = mutated(name, number)
        counts["images read by both"] += 1
        with quickly(_MOST_SECONDS):
            found = differences(name, image, place, daemon)
        for each in found:
            rule = rule_of(each)
            if rule is None:
                left.append(f"--only {name} --number {number}: {image.seed.kind}: {image.what}: {each}")
            else:
                counts[f"known disagreements, {rule.right} right"] += 1
    assert not left, "\n".join(left)
    return Done(f"{counts['images read by both']} images", counts)


@cache
def _daemon(programs: Path | None) -> tuple[Path, Daemon]:
    """The daemon of this process, and its folder."""
    folder = TemporaryDirectory(prefix="tapfs-differential-")
    daemon = Daemon(Path(folder.name), programs)
    atexit.register(folder.cleanup)
    atexit.register(daemon.end)
    return Path(folder.name), daemon


def main(words: list[str]) -> int:
    """Run the batches, or one mutation."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="FORMAT", choices=FORMATS, nargs="+", default=list(FORMATS))
    parser.add_argument("--first-seed", metavar="N", type=int, default=0)
    parser.add_argument(
        "--seeds", metavar="N", type=int, default=1, help="batches of each format (default: %(default)s)"
    )
    parser.add_argument("--number", metavar="N", type=int, help="one mutation only")
    parser.add_argument("--system", action="store_true", help="with the system's QEMU instead of that of the backports")
    parser.add_argument("--programs", metavar="DIR", type=Path, help="with the QEMU of a folder")
    parser.add_argument("--processes", metavar="N", type=int, default=1)
    arguments = parser.parse_args(words)
    programs = arguments.programs
    if programs is None and not arguments.system:
        programs = Path(newest_qemu("qemu-storage-daemon")).parent
    if arguments.number is not None:
        number = arguments.number
        one = (partial(run, name, [number], programs) for name in arguments.only)
        return failures((Job(f"{number}", f"{PROGRAM} --number {number}", each) for each in one), 1)
    batches = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    return failures(jobs(programs, batches, arguments.only), arguments.processes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
