"""Damaged qcow2 images against QEMU: the part `damages` of `make torture`.

    python -m tests.peer.qcow2_damage --kind 4096 --seeds 3 --processes 2

Each kind of image gets each damage, with choices by the seed. A failure says what both checkers say, and the words
that repeat it. The exit status is the number of failures, at most 100.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from tests.many_runs import Done, Job, failures
from tests.peer.newest_qemu import newest_qemu
from tests.peer.qcow2_damage.case import Case, damaged, judge
from tests.peer.qcow2_damage.damages import DAMAGES
from tests.peer.qcow2_damage.sound import KINDS

PROGRAM = "python -m tests.peer.qcow2_damage"


def jobs(
    programs: Path | None, seeds: Iterable[int], kinds: Iterable[str] = KINDS, damages: Iterable[str] = DAMAGES
) -> Iterator[Job]:
    """Every damage of every kind of image, in another order for each seed."""
    cases = [(kind, damage) for kind in kinds for damage in damages]
    for seed in seeds:
        random.Random(seed).shuffle(cases)
        for kind, damage in cases:
            case = Case(kind, damage, seed)
            yield Job(str(case), f"{PROGRAM} {case} --seeds 1", partial(_run, case, programs))


def _run(case: Case, programs: Path | None, folder: Path) -> Done:
    image = damaged(case)
    if image is None:
        return Done("has nothing to be damaged so", {})
    outcome = judge(case, image, folder, programs)
    counts = {"damaged images": 1, "known disagreements": outcome.disagreed, "mended wholly": outcome.mended}
    return Done(", ".join(name for name, number in counts.items() if number), {k: int(v) for k, v in counts.items()})


def main(words: list[str]) -> int:
    """Run the cases, in several processes if asked to."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", choices=KINDS, nargs="+", default=list(KINDS), metavar="KIND")
    parser.add_argument("--damage", choices=DAMAGES, nargs="+", default=list(DAMAGES), metavar="DAMAGE")
    parser.add_argument("--first-seed", metavar="N", type=int, default=1)
    parser.add_argument("--seeds", metavar="N", type=int, default=1, help="of each damage (default: %(default)s)")
    parser.add_argument("--system", action="store_true", help="with the system's QEMU instead of that of the backports")
    parser.add_argument("--programs", metavar="DIR", type=Path, help="with the qemu-img of a folder")
    parser.add_argument("--processes", metavar="N", type=int, default=1)
    arguments = parser.parse_args(words)
    programs = arguments.programs
    if programs is None and not arguments.system:
        programs = Path(newest_qemu("qemu-img")).parent
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    return failures(jobs(programs, seeds, arguments.kind, arguments.damage), arguments.processes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
