"""`tapfs changes`: the ranges that can have changed since a snapshot, from the maps alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.cli.changed_extents import extents_json, extents_table
from tapfs.cli.options import IMAGE_HELP, add_image_options, open_image
from tapfs.cli.reporting import add_json_option, print_line
from tapfs.cli.sizes import human_size

if TYPE_CHECKING:
    import argparse

    from tapfs.cli.parser import Subparsers

_DESCRIPTION = """\
Show the ranges of the disk of IMAGE that can have changed since SNAPSHOT, an image further down its backing
chain: what the images above SNAPSHOT hold. No data is read, so a range may hold again what it held before;
'tapfs diff SNAPSHOT IMAGE' looks, and writes a stream for 'tapfs apply'. Of a running guest take a snapshot first
(tapfs swap), and ask that."""


def add_parser(subparsers: Subparsers) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "changes", help="show what can have changed on a disk since a snapshot", description=_DESCRIPTION
    )
    parser.add_argument("image", metavar="IMAGE", help=IMAGE_HELP)
    parser.add_argument("--since", metavar="SNAPSHOT", help="an image of the chain (default: the first backing file)")
    add_json_option(parser)
    add_image_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Show them."""
    from tapfs.jobs.changes import changed_since

    with open_image(arguments, metadata_only=True) as image:
        found = changed_since(image, arguments.since)
        if arguments.json:
            extents_json({"size": image.size}, found)
            return 0
        sums = extents_table(found)
        print_line(f"{human_size(sums.data_bytes)} of data and {human_size(sums.zero_bytes)} of zeros can have changed")
    return 0
