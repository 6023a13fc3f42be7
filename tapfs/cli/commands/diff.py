"""`tapfs diff`: the ranges in which two disks differ, or all that makes the one of the other, as a stream."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from tapfs.cli.changed_extents import extents_json, extents_table
from tapfs.cli.commands.compare import add_second_image_options, second_image
from tapfs.cli.json_output import print_json
from tapfs.cli.options import IMAGE_HELP, add_image_options, open_image
from tapfs.cli.parser import UsageError
from tapfs.cli.reporting import add_json_option, add_progress_options, print_line, progress_of
from tapfs.cli.sizes import human_size

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from tapfs.cli.parser import Subparsers
    from tapfs.disk.image import Image
    from tapfs.jobs.diff import DiffReport


def add_parser(subparsers: Subparsers) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "diff",
        help="show or write what differs between two disks",
        description="Show the ranges in which the disk of image NEW differs from that of OLD, whatever their formats,\n"
        "in units of 4096 bytes. With -o write a stream that makes NEW of OLD: 'tapfs apply' takes it.\n"
        "What both take from the same place is not read: an overlay costs what is in it. docs/diff-stream.md tells\n"
        "more. Exit code: 0, whether they differ or not; others: 'tapfs --help'.",
    )
    parser.add_argument("image", metavar="OLD", help=IMAGE_HELP)
    parser.add_argument("second", metavar="NEW", help="the same; its options begin with --second, but for -F")
    parser.add_argument("-o", "--stream", metavar="FILE", help="write the stream into FILE (-: standard output)")
    parser.add_argument("--force", action="store_true", help="replace FILE if it is there")
    parser.add_argument(
        "--proof",
        choices=["none", "sample", "all"],
        default="sample",
        help="what of the rest the stream has digests of, so that apply knows the right base: samples of the data,"
        " or all of it, which reads both disks from end to end (default: %(default)s)",
    )
    add_json_option(parser)
    add_progress_options(parser)
    add_image_options(parser)
    add_second_image_options(parser, "NEW", "OLD")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Show or write the difference."""
    if arguments.stream == "-" and (arguments.json or sys.stdout.isatty()):
        raise UsageError("-o - writes a stream to standard output: send it to a file or a program", "tapfs diff")
    if arguments.stream is None and arguments.force:
        raise UsageError("--force goes with -o FILE", "tapfs diff")
    with (
        open_image(arguments) as old,
        open_image(second_image(arguments), path=arguments.second) as new,
        progress_of(arguments, "diff") as progress,
    ):
        if arguments.stream is not None:
            _write(arguments, old, new, progress)
        elif arguments.json:
            _print_json(old, new, progress)
        else:
            _print_table(old, new, progress, quiet=arguments.quiet)
    return 0


def _write(arguments: argparse.Namespace, old: Image, new: Image, progress: Callable[[int, int], None]) -> None:
    from tapfs.jobs.diff import write_diff, write_diff_file
    from tapfs.jobs.differences import Proof

    proof = Proof(arguments.proof)
    if arguments.stream == "-":
        write_diff(old, new, sys.stdout.buffer, proof=proof, progress=progress)
        sys.stdout.buffer.flush()
        return
    report = write_diff_file(old, new, arguments.stream, proof=proof, overwrite=arguments.force, progress=progress)
    if arguments.json:
        print_json({"sizes": [old.size, new.size], "extents": None, **report._asdict()})
    elif not arguments.quiet:
        print_line(f"{_changed(report)}; {human_size(report.stream_bytes)} written to {arguments.stream}")


def _changed(report: DiffReport) -> str:
    return f"{human_size(report.data_bytes)} of data and {human_size(report.zero_bytes)} of zeros differ"


def _print_json(old: Image, new: Image, progress: Callable[[int, int], None]) -> None:
    from tapfs.jobs.diff import changed_extents

    extents_json({"sizes": [old.size, new.size]}, changed_extents(old, new, progress), {"stream_bytes": None})


def _print_table(old: Image, new: Image, progress: Callable[[int, int], None], *, quiet: bool) -> None:
    from tapfs.jobs.diff import DiffReport, changed_extents

    sums = extents_table(changed_extents(old, new, progress), quiet=quiet)
    if quiet:
        return
    sizes = "" if old.size == new.size else f"; the sizes are {old.size} and {new.size} bytes"
    print_line(f"{_changed(DiffReport(*sums, 0))}{sizes}")
