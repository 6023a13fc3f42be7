"""`tapfs verify`: is a disk still what it was when it was hashed?"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from tapfs.cli.commands.hash import sidecar_of
from tapfs.cli.damaged_files import files_as_json, print_files
from tapfs.cli.json_output import print_json
from tapfs.cli.options import IMAGE_HELP, add_image_options, add_sector_size_option, open_image
from tapfs.cli.parser import add_rate_option
from tapfs.cli.reporting import add_json_option, add_progress_options, count_of, print_line, progress_of
from tapfs.cli.sizes import human_size
from tapfs.errors import CODES, ErrorKind

if TYPE_CHECKING:
    from tapfs.cli.parser import Subparsers
    from tapfs.disk.sidecar import Hashed
    from tapfs.jobs.damaged_files import DamagedPart
    from tapfs.jobs.verify import Verification

#: The disk differs, and its files were written since.
EXIT_CHANGED = 1
#: So many ranges are printed; --json has all of them.
_MOST_PRINTED = 50


def add_parser(subparsers: Subparsers) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "verify",
        help="compare a disk with the sidecar that 'tapfs hash' made of it",
        description="Read the disk of IMAGE and compare it with its sidecar; say which ranges differ. IMAGE may be of\n"
        "another format than the one that was hashed: what counts is what a guest reads.\n"
        "Exit code: 0 as it was hashed, 1 changed since (its files were written, or do not tell), 2 damaged (nobody\n"
        "has written to its files), 2 also for a damaged sidecar, which says so; others: 'tapfs --help'.",
    )
    parser.add_argument("image", metavar="IMAGE", help=IMAGE_HELP)
    parser.add_argument("sidecar", metavar="SIDECAR", nargs="?", help="as 'tapfs hash' names it if not given")
    parser.add_argument(
        "--root",
        metavar="DIGEST",
        type=_root_argument,
        help="the root that 'tapfs hash' has printed: SIDECAR must have it",
    )
    parser.add_argument("--files", action="store_true", help="say which files lie in what differs")
    add_sector_size_option(parser)
    add_rate_option(parser, "read")
    add_json_option(parser)
    add_progress_options(parser)
    add_image_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Verify and report."""
    from tapfs.disk.sidecar import Sidecar
    from tapfs.jobs.verify import verify

    path = sidecar_of(arguments)
    with Sidecar(path) as sidecar:
        if arguments.root is not None:
            sidecar.require_root(arguments.root)
        with open_image(arguments) as image, progress_of(arguments, "verify") as progress:
            found = verify(image, sidecar, rate=arguments.rate_limit, progress=progress)
            parts: list[DamagedPart] = []
            if arguments.files:
                from tapfs.jobs.damaged_files import files_in

                parts = files_in(image, found.differing, sector_size=arguments.sector_size)
    if arguments.json:
        files = {"files": files_as_json(parts)} if arguments.files else {}
        print_json({**verification_as_json(arguments.image, path, sidecar.hashed, found), **files})
    elif not arguments.quiet:
        print_verification(arguments.image, sidecar.hashed, found)
        print_files(parts)
    return exit_code(found)


def exit_code(found: Verification) -> int:
    """0 as it was, 1 changed, 2 damaged."""
    from tapfs.jobs.verify import Verdict

    return {Verdict.SAME: 0, Verdict.CHANGED: EXIT_CHANGED, Verdict.DAMAGED: CODES[ErrorKind.CORRUPT].exit_code}[
        found.verdict
    ]


def verification_as_json(path: str, sidecar: str, hashed: Hashed, found: Verification) -> dict[str, object]:
    """The result for programs."""
    return {
        "path": path,
        "sidecar": sidecar,
        "root": hashed.root.hex(),
        "verdict": found.verdict.value,
        "untouched": found.untouched,
        "disk_bytes": found.disk_bytes,
        "hashed_disk_bytes": hashed.disk_bytes,
        "leaf_bytes": hashed.leaf_bytes,
        "differing": [{"offset": offset, "length": length} for offset, length in found.differing],
        "unreadable": [
            {"offset": part.offset, "length": part.length, "message": error.message} for part, error in found.unreadable
        ],
    }


def print_verification(path: str, hashed: Hashed, found: Verification) -> None:
    """The result for people: the ranges, then one line that sums up."""
    from tapfs.jobs.verify import Verdict

    for offset, length in found.differing[:_MOST_PRINTED]:
        print_line(f"differs: bytes {offset} to {offset + length} ({human_size(length)})")
    if len(found.differing) > _MOST_PRINTED:
        print_line(f"... and {count_of(len(found.differing) - _MOST_PRINTED, 'further range')}")
    for (offset, length), error in found.unreadable[:_MOST_PRINTED]:
        print_line(f"cannot be read: bytes {offset} to {offset + length}: {error}")
    if found.disk_bytes != hashed.disk_bytes:
        print_line(f"the disk has {found.disk_bytes} bytes; it had {hashed.disk_bytes} when it was hashed")
    if found.verdict is Verdict.SAME:
        since = "" if found.untouched else "; its files are not those that were hashed, or were written since"
        print_line(f"{path}: the disk is as it was hashed{since}")
        return
    sums = human_size(sum(part.length for part in found.differing))
    if found.verdict is Verdict.DAMAGED:
        print_line(f"{path}: damaged: {sums} differ, and nobody has written to its files since it was hashed")
    else:
        print_line(
            f"{path}: changed since it was hashed: {sums} differ, and its files are others, were written since, or do"
            " not tell when"
        )


def _root_argument(text: str) -> bytes:
    try:
        root = bytes.fromhex(text)
    except ValueError:
        root = b""
    if len(root) != 32:
        raise argparse.ArgumentTypeError(f"not a root, which has 64 hexadecimal digits: {text!r}")
    return root
