"""`tapfs resume`: have a paused disk go on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.cli.guests.device import add_disk_options, ask_disk, require_device

if TYPE_CHECKING:
    import argparse

    from tapfs.cli.parser import Subparsers


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "resume",
        help="resume a disk that is paused or waits",
        description="Have a disk in use go on after 'tapfs pause', or try again at once what "
        "waits for the host, for space or for its disk to work ('tapfs list' says what it waits for). A block device "
        "that no process serves any more gets one.",
    )
    add_disk_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Resume it."""
    require_device(arguments, "tapfs resume")
    if arguments.ublk is not None:
        from tapfs.ublk.attaching import device_number, resume

        resume(device_number(arguments.ublk))
        return 0
    ask_disk(arguments, "resume")
    return 0
