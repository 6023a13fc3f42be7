"""`tapfs compare`: does a guest read the same from two images?"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from tapfs.cli.json_output import print_json
from tapfs.cli.options import IMAGE_HELP, add_image_options, disk_number, open_image
from tapfs.cli.parser import format_argument
from tapfs.cli.reporting import add_json_option, add_progress_options, print_line, progress_of

if TYPE_CHECKING:
    from tapfs.cli.parser import Subparsers

EXIT_DIFFERENT = 1


def add_parser(subparsers: Subparsers) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "compare",
        help="compare what a guest reads from two images",
        description="Compare what a guest reads from images A and B, whatever their formats.\n"
        "Where one is longer, its excess must read as zeros. Exit code: 0 same, 1 different; others: 'tapfs --help'.",
    )
    parser.add_argument("image", metavar="A", help=IMAGE_HELP)
    parser.add_argument("second", metavar="B", help="the same; its options begin with --second, but for -F")
    parser.add_argument("-s", "--strict", action="store_true", help="the sizes must be equal, too")
    add_json_option(parser)
    add_progress_options(parser)
    add_image_options(parser)
    add_second_image_options(parser, "B", "A")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Compare and say where they differ first."""
    from tapfs.jobs.compare import compare

    second = second_image(arguments)
    with open_image(arguments) as left, open_image(second, path=arguments.second) as right:
        sizes = (left.size, right.size)
        with progress_of(arguments, "compare") as progress:
            difference = compare(left, right, strict=arguments.strict, progress=progress)
    if arguments.json:
        offset = None if difference is None else difference.offset
        print_json({"same": difference is None, "offset": offset, "sizes": list(sizes)})
    elif not arguments.quiet:
        if difference is None:
            print_line("Images are identical." if sizes[0] == sizes[1] else "Images are identical but for their sizes.")
        elif difference.offset is None:
            print_line(f"Sizes differ: {sizes[0]} and {sizes[1]} bytes.")
        else:
            print_line(f"Content differs, first at byte {difference.offset} ({difference.offset:#x}).")
    return 0 if difference is None else EXIT_DIFFERENT


def add_second_image_options(parser: argparse.ArgumentParser, name: str, first: str) -> None:
    """Add what `second_image` reads. The positional that names the image is the caller's."""
    group = parser.add_argument_group(
        f"how to open {name} (the options above are for {first}, but the password is for both)"
    )
    group.add_argument("-F", "--second-format", metavar="FMT", type=format_argument, help=f"format of {name}")
    group.add_argument("--second-disk", metavar="N", type=disk_number, help=f"the disk of the package {name}")
    group.add_argument("--second-backing", metavar="FILE", help=f"use FILE as the parent of {name}")
    group.add_argument(
        "--second-backing-format",
        metavar="FMT",
        type=format_argument,
        action="append",
        default=[],
        help=f"formats of {name}'s parents, nearest first",
    )
    group.add_argument("--second-snapshot", metavar="NAME", help=f"the snapshot of {name}")


def second_image(arguments: argparse.Namespace) -> argparse.Namespace:
    """What the options say of the second image, as those of the first one are named."""
    second = argparse.Namespace(**vars(arguments))
    second.format = arguments.second_format
    second.disk = arguments.second_disk
    second.backing = arguments.second_backing
    second.backing_format = arguments.second_backing_format
    second.snapshot = arguments.second_snapshot
    second.say_raw = "say -F raw"
    return second
