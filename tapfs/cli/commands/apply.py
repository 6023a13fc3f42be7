"""`tapfs apply`: make the new disk of the old one and a difference that `tapfs diff` has written."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import sys
from typing import TYPE_CHECKING

from tapfs.cli.json_output import print_json
from tapfs.cli.options import IMAGE_HELP, add_image_options, open_image
from tapfs.cli.parser import UsageError, format_argument, parse_options
from tapfs.cli.reporting import add_json_option, add_progress_options, print_line, progress_of
from tapfs.cli.sizes import human_size, sizes_in_options
from tapfs.errors import ErrorKind, ImageError, from_os_error

if TYPE_CHECKING:
    import argparse
    from collections.abc import Generator
    from typing import BinaryIO

    from tapfs.cli.parser import Subparsers
    from tapfs.cli.progress import Progress
    from tapfs.disk.image import Image
    from tapfs.jobs.apply import ApplyReport


def add_parser(subparsers: Subparsers) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "apply",
        help="make a disk of another one and a difference between both",
        description="Apply DIFF, which 'tapfs diff -o' has written, to the disk of image BASE. The result is the new\n"
        "image NEW, which appears only when it is complete and durable, or BASE itself (--in-place). BASE may be of\n"
        "any format, if its disk is the OLD of the difference; where DIFF has digests of it that is proved. A DIFF\n"
        "that is damaged or was cut is refused. docs/diff-stream.md tells more.",
    )
    parser.add_argument("image", metavar="BASE", help=IMAGE_HELP)
    parser.add_argument("stream", metavar="DIFF", help="a file, or - for standard input")
    parser.add_argument("target", metavar="NEW", nargs="?", help="the new image: a file name or ram:NAME")
    parser.add_argument(
        "-O", "--output-format", metavar="FMT", type=format_argument, help="format of NEW (default: that of BASE)"
    )
    parser.add_argument(
        "-o",
        dest="options",
        metavar="KEY=VALUE,...",
        action="append",
        default=[],
        help="options of that format; 'tapfs create -f FMT -o help' lists them",
    )
    parser.add_argument("--overlay", action="store_true", help="make NEW an overlay over BASE, with what changes only")
    parser.add_argument("--in-place", action="store_true", help="change BASE; DIFF is read twice, so it is a file")
    parser.add_argument("-n", "--dry-run", action="store_true", help="only prove that DIFF is whole and fits BASE")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with --in-place where a crash of the host has left what is neither old nor new",
    )
    add_json_option(parser)
    add_progress_options(parser)
    add_image_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Apply, or only prove that it can be done."""
    _require_one_way(arguments)
    writable = arguments.in_place and not arguments.dry_run
    with open_image(arguments, writable=writable) as base, progress_of(arguments, "apply") as progress:
        report = _applied(arguments, base, progress)
    if arguments.json:
        print_json({"dry_run": arguments.dry_run, **report._asdict()})
    elif not arguments.quiet:
        done = "would be replaced" if arguments.dry_run else "replaced"
        print_line(
            f"{human_size(report.data_bytes)} {done} by data and {human_size(report.zero_bytes)} by zeros;"
            f" {human_size(report.proved_bytes)} of the rest proved to be the same"
        )
    return 0


def _require_one_way(arguments: argparse.Namespace) -> None:
    program = "tapfs apply"
    ways = (arguments.target is not None) + arguments.in_place
    if ways > 1:
        raise UsageError("NEW and --in-place are two ways: choose one", program)
    if not ways and not arguments.dry_run:
        raise UsageError("the result is missing: name a NEW image, or say --in-place", program)
    if arguments.in_place and (arguments.overlay or arguments.output_format or arguments.options):
        raise UsageError("--overlay, -O and -o are for a NEW image", program)
    if arguments.resume and arguments.target is not None:
        raise UsageError("--resume goes with --in-place", program)


def _applied(arguments: argparse.Namespace, base: Image, progress: Progress) -> ApplyReport:
    from tapfs.jobs.apply import apply_in_place, apply_to_new, verify_base

    name = arguments.stream
    with _opened(name) as file:
        path = None if name == "-" else name
        if arguments.dry_run:
            return verify_base(base, file, path=path, resume=arguments.resume, progress=progress)
        if arguments.target is None:
            return apply_in_place(
                base, lambda: _from_start(file, name), path=path, resume=arguments.resume, progress=progress
            )
        try:
            options = sizes_in_options(parse_options(arguments.options, "tapfs apply"))
        except ValueError as error:
            raise UsageError(f"-o {','.join(arguments.options)}: {error}", "tapfs apply") from None
        return apply_to_new(
            base,
            file,
            arguments.target,
            target_format=arguments.output_format or base.format_name,
            overlay=arguments.overlay,
            options=options,
            path=path,
            progress=progress,
        )


@contextlib.contextmanager
def _opened(name: str) -> Generator[BinaryIO]:
    if name == "-":
        yield sys.stdin.buffer
        return
    try:
        file = open(name, "rb", buffering=1 << 20)  # noqa: SIM115  closed below
    except OSError as error:
        raise from_os_error(error, path=name, op="open the difference") from error
    with file:
        yield file


def _from_start(file: BinaryIO, name: str) -> BinaryIO:
    """The stream from its first byte. Raises ImageError(unsupported) where it is no file that can be read again."""
    try:
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.seek(0)
            return file
    except (OSError, io.UnsupportedOperation):
        pass
    raise ImageError(
        ErrorKind.UNSUPPORTED,
        "is no file, and in place a difference is read twice: to prove it, and to apply it",
        path=name,
        op="apply",
        remedy="keep it in a file first, or make a new image",
    )
