"""`tapfs mirror`: copy a disk in use to a new image while it is used, and go on with the copy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.cli.guests.device import add_copied_disk_options, require_device
from tapfs.cli.guests.live_job import do_live_job
from tapfs.cli.parser import UsageError, add_rate_option, format_argument
from tapfs.cli.reporting import add_json_option, add_progress_options, print_line, progress_of

if TYPE_CHECKING:
    import argparse

    from tapfs.cli.parser import Subparsers

_DESCRIPTION = """\
Copy a guest's disk or a block device into the new image TARGET while it is used, whatever the two formats
are, and wherever TARGET lies. TARGET appears when it is complete and durable, and holds the disk of that one
moment. An error of TARGET ends the copy, and the guest sees nothing of it; Ctrl-C ends it, too.

With --pivot the disk is TARGET from that moment on. Its name becomes a link to TARGET, so whoever
starts the guest again finds the newest state; the old image gets the name with .mirrored behind it. With
--keep-names both keep their names, as for block devices: the toolstack has to name TARGET then."""

_PROGRAM = "tapfs mirror"


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "mirror", help="copy a disk in use to a new image, and go on with the copy", description=_DESCRIPTION
    )
    add_copied_disk_options(parser)
    parser.add_argument("target", metavar="TARGET", help="the new image")
    parser.add_argument(
        "-O", "--target-format", metavar="FMT", type=format_argument, required=True, help="the format of TARGET"
    )
    parser.add_argument("--pivot", action="store_true", help="go on with TARGET when it is complete")
    parser.add_argument("--keep-names", action="store_true", help="with --pivot: change no name")
    parser.add_argument("--force", action="store_true", help="replace TARGET if it is there already")
    add_rate_option(parser, "write")
    add_json_option(parser)
    add_progress_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Copy it, and say what was copied."""
    import os

    from tapfs.cli.json_output import print_json

    require_device(arguments, _PROGRAM)
    if not arguments.target:
        raise UsageError("TARGET must be the name of a file", _PROGRAM)
    if arguments.keep_names and not arguments.pivot:
        raise UsageError("--keep-names says how --pivot is done", _PROGRAM)
    target = os.path.abspath(arguments.target)
    with progress_of(arguments, "mirror") as progress:
        done = do_live_job(
            arguments,
            "mirror",
            progress,
            file=target,
            format=arguments.target_format,
            rate=arguments.rate_limit,
            overwrite=arguments.force,
            pivot=arguments.pivot,
            keep_names=arguments.keep_names,
        )
    if arguments.json:
        print_json({"target": target, "data_bytes": done["data_bytes"], "pivot": arguments.pivot})
    elif not arguments.quiet:
        print_line(f"Mirrored to {target}: {done['data_bytes']} bytes of data.")
    return 0
