"""`tapfs resume`: have a paused disk go on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.cli.guests.device import add_device_options, ask_disk

if TYPE_CHECKING:
    import argparse

    from tapfs.cli.parser import Subparsers


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "resume",
        help="resume a disk that is paused or waits",
        description="Have the disk of a guest go on after 'tapfs pause', or try again at once what waits for space "
        "on a full host ('tapfs list' says that it waits).",
    )
    add_device_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Resume it."""
    ask_disk(arguments, "resume")
    return 0
