"""`tapfs stats`: what guests ask of their disks."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from tapfs.cli.guests.device import add_device_options, find_named_device, with_xenstore
from tapfs.cli.json_output import print_json
from tapfs.cli.parser import UsageError
from tapfs.cli.reporting import add_json_option, print_columns

if TYPE_CHECKING:
    import argparse

    from tapfs.cli.parser import Subparsers
    from tapfs.xen.host import Host
    from tapfs.xen.toolstack.attached_disks import AttachedDisk
    from tapfs.xen.xenstore.client import XenStore

#: Column, and the counter of the disk's process that it shows.
_COUNTERS = {
    "READS": "reads",
    "WRITES": "writes",
    "FLUSHES": "flushes",
    "DISCARDS": "discards",
    "READ": "read_bytes",
    "WRITTEN": "written_bytes",
    "ERRORS": "errors",
    "MERGED": "merged",
    "IN FLIGHT": "in_flight",
}

_DESCRIPTION = """\
Show what guests have asked of their disks since the process of each was started: requests, bytes READ
and WRITTEN, requests answered with ERRORS, requests MERGED with the one before, and those IN FLIGHT
now. '-': the process does not answer. With --json all its counters."""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser("stats", help="count what Xen guests ask of their disks", description=_DESCRIPTION)
    add_device_options(parser, required=False)
    parser.add_argument("--interval", metavar="S", type=float, help="look again every S seconds, until interrupted")
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print a table, or with --json a list of objects; once, or again and again."""
    if (arguments.domain is None) != (arguments.vdev is None):
        raise UsageError("--domain and --vdev name a disk together; without both all are shown", "tapfs stats")
    if arguments.interval is not None and not 0 < arguments.interval < 1 << 20:
        raise UsageError("--interval must be a number of seconds", "tapfs stats")

    async def work(store: XenStore, _host: Host) -> list[AttachedDisk]:
        from tapfs.xen.toolstack.attached_disks import attached_disks

        return await attached_disks(store, await find_named_device(store, arguments) if arguments.domain else None)

    while True:
        disks = with_xenstore(work)
        if arguments.json:
            print_json([asdict(disk) for disk in disks])
        else:
            print_columns([("DOMAIN", "VDEV", *_COUNTERS), *map(_row, disks)])
        if arguments.interval is None:
            return 0
        print(flush=True)
        time.sleep(arguments.interval)


def _row(disk: AttachedDisk) -> tuple[str, ...]:
    counted = disk.statistics or {}
    return (str(disk.domain), disk.vdev, *(str(counted.get(name, "-")) for name in _COUNTERS.values()))
