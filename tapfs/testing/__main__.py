"""The suites of the kit over one format, from the command line.

    python -m tapfs.testing qcow --option cluster_size=4096
    python -m tapfs.testing tapfs_toy:FORMAT --image small.toy --image large.toy

FORMAT is the name of an installed format (an entry point of the group tapfs.formats), or module:OBJECT. A writable
format is tested by random requests, by crashes and by new sizes; every format by damaged images. What fails is named
with the words that repeat it. The exit code is 1 then.
"""

from __future__ import annotations

import argparse
import resource
import sys
import traceback
from pathlib import Path

from tapfs.driver import Resizable
from tapfs.errors import ImageError
from tapfs.testing import crash, hostile, operations, resize
from tapfs.testing.subject import ViolationError, subject_named

#: Each suite: its function, and the amount of work in one run.
_SUITES = {
    "operations": (operations.run, 60),
    "crash": (crash.run, 30),
    "resize": (resize.run, 12),
    "hostile": (hostile.run, 200),
}

#: A driver that takes more for a damaged image believes what the image says of its size.
_MEMORY_BYTES = 4 << 30


def main(words: list[str] | None = None) -> int:
    """Run the suites; the exit code is 1 if one failed."""
    parser = argparse.ArgumentParser(
        prog="python -m tapfs.testing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("format", metavar="FORMAT")
    parser.add_argument("--suite", choices=_SUITES, action="append", help="only this one; may be given again")
    parser.add_argument("--seeds", metavar="N", type=int, default=5, help="runs of each suite (default: %(default)s)")
    parser.add_argument("--first-seed", metavar="N", type=int, default=0)
    parser.add_argument("--option", metavar="NAME=VALUE", action="append", default=[], help="for making images")
    parser.add_argument("--size", metavar="BYTES", type=int, help="of the disks that are made")
    parser.add_argument("--overlay", action="store_true", help="make images over a parent")
    parser.add_argument("--image", metavar="FILE", type=Path, action="append", default=[], help="an image to damage")
    arguments = parser.parse_args(words)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    try:
        subject = subject_named(
            arguments.format,
            size=arguments.size,
            options=dict(option.split("=", 1) for option in arguments.option),
            overlay=arguments.overlay,
            images=arguments.image,
        )
        unfinished = subject.unfinished()
        writable = subject.writable
    except (ImageError, ImportError, AttributeError, OSError, ValueError) as error:
        parser.error(str(error))
    failed = unfinished is not None
    if unfinished is not None:
        sys.stdout.write(f"contract: FAILED: {unfinished}\n")
    for name in arguments.suite or _SUITES:
        run, amount = _SUITES[name]
        if name != "hostile" and not writable:
            sys.stdout.write(f"{name}: left out, for the format makes no images that can be written\n")
            continue
        if name == "resize" and not isinstance(subject.opened(subject.new_file(), writable=True), Resizable):
            sys.stdout.write(f"{name}: left out, for the disks of the format keep their sizes\n")
            continue
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            try:
                said = run(subject, seed, amount)
            except (ViolationError, AssertionError, ImageError) as error:
                failed = True
                traceback.print_exception(error, limit=-3)
                said = f"FAILED: {error}\n  again: --suite {name} --first-seed {seed} --seeds 1"
            sys.stdout.write(f"{name} {seed}: {said}\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
