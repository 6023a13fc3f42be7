"""`tapfs limit`: how much may be asked of a disk in use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.cli.guests.device import add_disk_options, ask_disk, require_device
from tapfs.cli.parser import UsageError, size_argument

if TYPE_CHECKING:
    import argparse

    from tapfs.cli.parser import Subparsers

_MAX_REQUESTS = 1 << 32

_DESCRIPTION = """\
Limit the rate at which a guest's disk, a block device or a disk of 'tapfs serve' (but by vhost-user) is used, at
once and until it is detached or its server ends. 0 takes a limit away; what is not named stays as it is."""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser("limit", help="limit the rate of a disk in use", description=_DESCRIPTION)
    add_disk_options(parser)
    parser.add_argument("--bytes", metavar="N", type=size_argument, help="bytes a second, read and written together")
    parser.add_argument("--requests", metavar="N", type=int, help="requests a second")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Set the limits."""
    if arguments.bytes is None and arguments.requests is None:
        raise UsageError("say --bytes, --requests or both", "tapfs limit")
    if arguments.requests is not None and not 0 <= arguments.requests <= _MAX_REQUESTS:
        raise UsageError(f"--requests must be from 0 to {_MAX_REQUESTS}", "tapfs limit")
    require_device(arguments, "tapfs limit")
    ask_disk(arguments, "limit", bytes=arguments.bytes, requests=arguments.requests)
    return 0
