"""`tapfs convert`: copy an image into another format."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.cli.options import add_image_options, cache_bytes_of, open_image, unlocked
from tapfs.cli.parser import UsageError, format_argument
from tapfs.cli.reporting import add_progress_options, progress_of
from tapfs.cli.targets import (
    add_target_options,
    default_format,
    new_image_of,
    print_options,
    wants_encryption,
    wants_help,
)

if TYPE_CHECKING:
    import argparse

    from tapfs.cli.parser import Subparsers
    from tapfs.disk.image import Image

_PROGRAM = "tapfs convert"


def add_parser(subparsers: Subparsers) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "convert",
        help="copy an image into another format",
        description="Copy what a guest reads from SOURCE into the new image TARGET. Zeros take no space.\n"
        "TARGET appears under its name, and replaces what was there, only when it is complete and durable:\n"
        "an interrupted or failed convert changes nothing. A block device is written in place, without a question,\n"
        "and what lies behind the end of the image on it is left as it is. An empty file that cannot be replaced,\n"
        "such as a container's volume, is written in place, too.\n"
        "With -b only what differs from that parent is written.",
    )
    parser.add_argument("image", metavar="SOURCE", nargs="?")
    parser.add_argument("target", metavar="TARGET", nargs="?", help="a file name, a block device, or ram:NAME")
    parser.add_argument(
        "-O",
        "--target-format",
        metavar="FMT",
        type=format_argument,
        help="format of TARGET (default: raw; with -n what TARGET shows, but raw must be named)",
    )
    parser.add_argument("-c", "--compress", action="store_true", help="compress TARGET")
    parser.add_argument(
        "-n",
        "--no-create",
        action="store_true",
        help="write into the existing disk TARGET; zeros are written, too, up to its end unless it is a device",
    )
    add_progress_options(parser)
    add_target_options(parser, "target-")
    add_image_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Copy it."""
    if not arguments.no_create or wants_help(arguments):  # what is there already is what its contents show
        arguments.target_format = arguments.target_format or default_format(arguments.target or "", "-O")
    if wants_help(arguments):
        return print_options(arguments.target_format)
    _check(arguments)
    with open_image(arguments) as source:
        if arguments.no_create:
            _into_existing(arguments, source)
        else:
            _into_new(arguments, source)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    if arguments.image is None or arguments.target is None:
        raise UsageError("SOURCE and TARGET are needed", _PROGRAM)
    if arguments.no_create and (
        arguments.target_backing or arguments.options or arguments.encrypt or arguments.compress
    ):
        raise UsageError("-n writes into an image as it is: -b, -o, -c and --encrypt are for new ones", _PROGRAM)
    encrypts = arguments.no_create or wants_encryption(arguments, arguments.target_format)
    if arguments.target_key_file is not None and not encrypts:
        raise UsageError("--target-key-file goes with --encrypt or -n", _PROGRAM)


def _into_new(arguments: argparse.Namespace, source: Image) -> None:
    from tapfs.jobs.convert import convert_to_new

    new = new_image_of(
        arguments,
        arguments.target,
        format_name=arguments.target_format,
        size=source.size,
        key_file=arguments.target_key_file or arguments.key_file,
        program=_PROGRAM,
    )
    with progress_of(arguments, "convert") as progress:
        convert_to_new(source, arguments.target, new, compressed=arguments.compress, progress=progress)


def _into_existing(arguments: argparse.Namespace, source: Image) -> None:
    from tapfs.disk import opening
    from tapfs.disk.chain import OpenOptions
    from tapfs.jobs.convert import Baseline, convert, refuse_own_chain

    refuse_own_chain(source, arguments.target)
    options = OpenOptions(
        format=arguments.target_format,
        writable=True,
        direct=arguments.direct,
        write_base=arguments.write_base,
        cache_bytes=cache_bytes_of(arguments),
        say_raw="say {target_format=raw}",
    )
    with (
        unlocked(
            arguments.target_key_file or arguments.key_file,
            arguments.target,
            lambda password: opening.open_image(arguments.target, options, password=password),
        ) as target,
        progress_of(arguments, "convert") as progress,
    ):
        convert(source, target, baseline=Baseline.ANYTHING, progress=progress)
