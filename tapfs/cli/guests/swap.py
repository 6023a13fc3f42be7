"""`tapfs swap`: a live snapshot: put an overlay under a guest's disk while it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.cli.guests.device import add_device_options, ask_disk
from tapfs.cli.parser import UsageError, size_argument

if TYPE_CHECKING:
    import argparse

    from tapfs.cli.parser import Subparsers

_DESCRIPTION = """\
Take a live snapshot of a guest's disk: it is paused, what it has written is flushed, and from then
on all writes go to the qcow file OVERLAY, which is made if it is not there. The image below stays as
it was at that moment: copy it, or keep it. The guest sees a short pause. A disk that was paused
before stays paused."""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "swap", help="live snapshot: put an overlay on a guest's disk", description=_DESCRIPTION
    )
    add_device_options(parser)
    parser.add_argument("overlay", metavar="OVERLAY", help="the file that takes the writes from now on")
    parser.add_argument("--size", type=size_argument, help="make the disk this large in the new overlay")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Do it."""
    import os

    if not arguments.overlay:
        raise UsageError("OVERLAY must name a file", "tapfs swap")
    ask_disk(arguments, "swap", overlay=os.path.abspath(arguments.overlay), size=arguments.size)
    return 0
