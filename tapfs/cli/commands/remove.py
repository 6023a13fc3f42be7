"""`tapfs remove`: remove a RAM disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.cli.parser import UsageError

if TYPE_CHECKING:
    import argparse

    from tapfs.cli.parser import Subparsers


def add_parser(subparsers: Subparsers) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "remove",
        help="remove a RAM disk",
        description="Remove the RAM disk ram:NAME. Who has it open keeps it; the last to close it frees its memory.\n"
        "Image files are removed with rm.",
    )
    parser.add_argument("image", metavar="ram:NAME", help="as 'tapfs list' shows it")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Remove it."""
    from tapfs.host import ram
    from tapfs.host.location import locate

    if not locate(arguments.image).in_memory:
        raise UsageError(f"{arguments.image!r} is no RAM disk; image files are removed with rm", "tapfs remove")
    ram.remove(arguments.image)
    return 0
