"""`tapfs pause`: have a disk in use stand still."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.cli.guests.device import add_disk_options, ask_disk, require_device

if TYPE_CHECKING:
    import argparse

    from tapfs.cli.parser import Subparsers

_DESCRIPTION = """\
Pause a guest's disk, a block device or a served disk: what is under way is finished and flushed, and when this
returns nothing reads or writes the image until 'tapfs resume'. Whoever uses the disk waits, and sees no error. The
pause of a served disk ends with its server."""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser("pause", help="pause a disk in use", description=_DESCRIPTION)
    add_disk_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Pause it."""
    require_device(arguments, "tapfs pause")
    ask_disk(arguments, "pause")
    return 0
