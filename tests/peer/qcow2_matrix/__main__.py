"""The matrix of qcow2 images against QEMU 10: the part of `make torture` that needs a peer.

    python -m tests.peer.qcow2_matrix --seeds 200 --first-seed 0 --processes 2

A failure names the kind of image, what was done to it, and the words that repeat it. The exit status is the number of
failures, at most 100.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import traceback
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from tests.peer.newest_qemu import newest_qemu
from tests.peer.qcow2_matrix.run import run

PROGRAM = "python -m tests.peer.qcow2_matrix"


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
    with ProcessPoolExecutor(arguments.processes) as pool:
        failed = pool.map(partial(_fails, turns=arguments.turns, programs=programs), seeds)
        return min(100, sum(failed))


def _fails(seed: int, turns: int, programs: Path | None) -> bool:
    failed = False
    with tempfile.TemporaryDirectory(prefix="tapfs-matrix-", dir=os.environ.get("TMPDIR")) as folder:
        try:
            said = run(str(seed), turns, Path(folder), programs)
        except Exception:  # noqa: BLE001  whatever it is, the other images go on
            failed = True
            said = f"{traceback.format_exc()}FAILED: {PROGRAM} --first-seed {seed} --seeds 1 --turns {turns}"
    sys.stdout.write(f"{seed}: {said}\n")
    sys.stdout.flush()
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
