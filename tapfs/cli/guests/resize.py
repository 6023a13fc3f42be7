"""`tapfs resize`: tell a guest the new size of its disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.cli.guests.device import add_device_options, ask_disk
from tapfs.cli.parser import size_argument
from tapfs.cli.sizes import human_size

if TYPE_CHECKING:
    import argparse

    from tapfs.cli.parser import Subparsers

_DESCRIPTION = """\
Change the size of a guest's disk (a raw image or a RAM disk) while the guest runs, and tell it. Without
SIZE the guest learns the size that the image has now."""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser("resize", help="resize the disk of a Xen guest", description=_DESCRIPTION)
    add_device_options(parser)
    parser.add_argument(
        "size", metavar="SIZE", nargs="?", type=size_argument, help="the new size: bytes, or 10G and the like"
    )
    parser.add_argument(
        "--force", action="store_true", help="even if it gets smaller: what lies behind the end is lost"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Resize it, and say what size it has."""
    ask_disk(arguments, "resize", size=arguments.size, force=arguments.force)
    size: int = ask_disk(arguments, "status")["size"]
    print(f"{size} bytes ({human_size(size)})")
    return 0
