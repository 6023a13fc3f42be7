"""`tapfs swap`: a live snapshot of a guest's disk, after which the disk keeps its name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.cli.guests.device import add_device_options, ask_disk
from tapfs.cli.parser import UsageError, size_argument

if TYPE_CHECKING:
    import argparse

    from tapfs.cli.parser import Subparsers

_DESCRIPTION = """\
Take a live snapshot of a guest's disk: it is paused, what it has written is flushed, and the image
gets the name FILE, under which it stays as it was at that moment: copy it, or keep it. From then on
all writes go to an overlay over FILE, which has the name that the image had. So whoever starts the
guest again, restores or moves it opens the newest state. The guest sees a short pause. A disk that
was paused before stays paused.

With --keep-names the image keeps its name, and FILE is the overlay: for block devices and RAM disks,
whose names cannot pass to a file. The toolstack has to name FILE then, before the guest starts again:
until it does, the image below is not opened for writing."""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "swap", help="live snapshot: keep what a guest's disk holds under another name", description=_DESCRIPTION
    )
    add_device_options(parser)
    parser.add_argument("file", metavar="FILE", help="the new name of what the disk holds now")
    parser.add_argument("--size", type=size_argument, help="make the disk this large in the new overlay")
    parser.add_argument(
        "--keep-names", action="store_true", help="let FILE be the overlay that takes the writes from now on"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Do it."""
    import os

    if not arguments.file:
        raise UsageError("FILE must be the name of a file", "tapfs swap")
    file = os.path.abspath(arguments.file)
    ask_disk(arguments, "swap", file=file, size=arguments.size, keep_names=arguments.keep_names)
    return 0
