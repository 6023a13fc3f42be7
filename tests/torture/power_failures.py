"""Power failures of the part `crash`: in drivers' plans, in new sizes, and in commands on chains.

python -m tests.torture.power_failures --what commit --kind 'vhd over vhd' --seed 7
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

from tapfs.kernel.crc32c import use_instruction
from tapfs.testing import resize
from tapfs.testing.subject import subject_named
from tests import driver_runs
from tests.crash import chains, live_chains
from tests.driver_rows import ROWS
from tests.kit_kinds import resizable_kinds
from tests.many_runs import Done, Job, failures

PROGRAM = "python -m tests.torture.power_failures"
#: New sizes of one run. Each has `resize.CRASHES` crashes.
_SIZES = 12
_RESIZED = {str(kind): kind for kind in resizable_kinds()}


def _resize(folder: Path, kind: str, seed: str) -> int:
    del folder
    name, options, overlay = _RESIZED[kind]
    # Blocks of VDI and VHDX have 1 MiB, and other sizes have to be of more and fewer of them.
    size = 2 << 20 if name in {"vdi", "vhdx"} else 300_032
    subject = subject_named(name, size=size, options=options, overlay=overlay)
    resize.run(subject, int(seed), _SIZES)
    return _SIZES * resize.CRASHES


#: By what is cut off: the kinds, and what counts the crashes of one of them in a folder, from a seed.
WHATS: Mapping[str, tuple[Iterable[str], Callable[[Path, str, str], int]]] = {
    "resize": (_RESIZED, _resize),
    "commit": (chains.CHAINS, chains.commit),
    "rebase": (chains.CHAINS, chains.rebase),
    "live-commit": (live_chains.CHAINS, live_chains.live_commit_crashes),
}


def _run(what: str, kind: str, seed: int, folder: Path) -> Done:
    count = WHATS[what][1](folder, kind, str(seed))
    return Done(f"{count} crashes", {"crash points": count})


def jobs(seeds: Iterable[int]) -> Iterator[Job]:
    """Runs of all that a power failure can cut off, one seed after the other."""
    use_instruction()  # else the journals of VHDX are half of the time
    for seed in seeds:
        yield from driver_runs.jobs(["crash"], list(ROWS), [seed])
        for what, (kinds, _) in WHATS.items():
            for kind in kinds:
                again = f"{PROGRAM} --what {what} --kind '{kind}' --seed {seed}"
                yield Job(f"{what} {kind} {seed}", again, partial(_run, what, kind, seed))


def main(words: list[str]) -> int:
    """Run all kinds of one command, or one kind, with a seed."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--what", choices=WHATS, required=True)
    parser.add_argument("--kind", metavar="KIND", help="only this kind of image or chain")
    parser.add_argument("--seed", metavar="N", type=int, default=0)
    arguments = parser.parse_args(words)
    kinds = list(WHATS[arguments.what][0])
    if arguments.kind not in {None, *kinds}:
        parser.error(f"there is no kind {arguments.kind} for {arguments.what}; the kinds: {', '.join(kinds)}")
    chosen = kinds if arguments.kind is None else [arguments.kind]
    return failures((Job(kind, "", partial(_run, arguments.what, kind, arguments.seed)) for kind in chosen), 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
