"""`tapfs pause`: have a guest's disk stand still."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.cli.guests.device import add_device_options, ask_disk

if TYPE_CHECKING:
    import argparse

    from tapfs.cli.parser import Subparsers

_DESCRIPTION = """\
Pause a guest's disk: what is under way is finished and flushed, and when this returns nothing reads
or writes the image until 'tapfs resume'. The guest waits; it sees no error."""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser("pause", help="pause the disk of a Xen guest", description=_DESCRIPTION)
    add_device_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Pause it."""
    ask_disk(arguments, "pause")
    return 0
