"""`tapfs create`: make an empty image, an overlay or a RAM disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.cli.parser import UsageError, format_argument, size_argument
from tapfs.cli.targets import (
    add_target_options,
    default_format,
    new_image_of,
    print_options,
    take_backing_options,
    wants_encryption,
    wants_help,
)

if TYPE_CHECKING:
    import argparse

    from tapfs.cli.parser import Subparsers

_PROGRAM = "tapfs create"


def add_parser(subparsers: Subparsers) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "create",
        help="make an empty image, an overlay or a RAM disk",
        description="Make the image FILE of SIZE bytes (or 10G, 1.5GiB, 10MB, ...). With -b it is an overlay that\n"
        "reads as its parent until it is written to; SIZE is then the parent's if it is left out.\n"
        "An existing file that is not empty is left alone without --force, and so is a block device that is not\n"
        "blank (its first and last MiB). Of a device SIZE bytes are zeroed and the rest is left as it is.",
    )
    parser.add_argument("image", metavar="FILE", nargs="?", help="a file name, a block device, or ram:NAME")
    parser.add_argument(
        "size", metavar="SIZE", nargs="?", type=size_argument, help="bytes of the disk: 10G, 1.5GiB, 10MB, ..."
    )
    parser.add_argument(
        "-f", "--format", metavar="FMT", type=format_argument, help="format of the new image (default: raw)"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="accepted: create prints nothing but errors")
    parser.add_argument("--force", action="store_true", help="replace what FILE holds")
    add_target_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Make it."""
    format_name: str = arguments.format or default_format(arguments.image or "", "-f")
    if wants_help(arguments):
        return print_options(format_name)
    take_backing_options(arguments, _PROGRAM)
    if arguments.image is None:
        raise UsageError("FILE is missing", _PROGRAM)
    if arguments.size is None and arguments.target_backing is None:
        raise UsageError("SIZE is missing (it may be left out only with -b)", _PROGRAM)
    if arguments.target_key_file is not None and not wants_encryption(arguments, format_name):
        raise UsageError("--key-file goes with --encrypt", _PROGRAM)
    from tapfs.jobs.create import create_image

    new = new_image_of(
        arguments,
        arguments.image,
        format_name=format_name,
        size=arguments.size,
        key_file=arguments.target_key_file,
        program=_PROGRAM,
    )
    create_image(arguments.image, new, overwrite=arguments.force)
    return 0
