"""`tapfs stats`: what is asked of disks in use."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from tapfs.cli.guests.device import add_disk_options, find_named_device, names_device, with_xenstore
from tapfs.cli.json_output import print_json
from tapfs.cli.parser import UsageError
from tapfs.cli.reporting import add_json_option, print_columns
from tapfs.errors import ImageError

if TYPE_CHECKING:
    import argparse

    from tapfs.cli.parser import Subparsers
    from tapfs.serving.served_disks import ServedDisk
    from tapfs.ublk.attaching import AttachedDevice
    from tapfs.xen.host import Host
    from tapfs.xen.toolstack.attached_disks import AttachedDisk
    from tapfs.xen.xenstore.client import XenStore

    _Disk = AttachedDisk | AttachedDevice | ServedDisk

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
Show what was asked of the disks of guests, of block devices and of served disks since the process of
each was started: requests, bytes READ and WRITTEN, requests answered with ERRORS, requests MERGED with
the one before, and those IN FLIGHT now. '-': the process does not answer, or does not count it. With
--json all its counters."""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser("stats", help="count what is asked of disks in use", description=_DESCRIPTION)
    add_disk_options(parser)
    parser.add_argument("--interval", metavar="S", type=float, help="look again every S seconds, until interrupted")
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print a table, or with --json a list of objects; once, or again and again."""
    names_device(arguments, "tapfs stats")
    if arguments.interval is not None and not 0 < arguments.interval < 1 << 20:
        raise UsageError("--interval must be a number of seconds", "tapfs stats")
    while True:
        disks: list[_Disk] = [*_of_guests(arguments), *_of_host(arguments), *_of_servers(arguments)]
        if arguments.json:
            print_json([asdict(disk) for disk in disks])
        else:
            print_columns([("DOMAIN", "DISK", *_COUNTERS), *map(_row, disks)])
        if arguments.interval is None:
            return 0
        print(flush=True)
        time.sleep(arguments.interval)


def _of_guests(arguments: argparse.Namespace) -> list[AttachedDisk]:
    """The disks of guests that are asked for; without Xen there are none."""
    from tapfs.xen.host import find_host

    if arguments.ublk is not None or arguments.served is not None:
        return []
    if arguments.domain is None:
        try:
            find_host()
        except ImageError:
            return []

    async def work(store: XenStore, _host: Host) -> list[AttachedDisk]:
        from tapfs.xen.toolstack.attached_disks import attached_disks

        return await attached_disks(store, await find_named_device(store, arguments) if arguments.domain else None)

    return with_xenstore(work)


def _of_host(arguments: argparse.Namespace) -> list[AttachedDevice]:
    """The block devices that are asked for."""
    from tapfs.ublk.record import records

    if arguments.domain is not None or arguments.served is not None:
        return []
    if arguments.ublk is None and not records():
        return []
    from tapfs.ublk.attaching import attached_devices, device_number, look_at

    return attached_devices() if arguments.ublk is None else [look_at(device_number(arguments.ublk))]


def _of_servers(arguments: argparse.Namespace) -> list[ServedDisk]:
    """The served disks that are asked for."""
    from tapfs.serving.served_disks import look_at, served_disks

    if arguments.served is not None:
        return [look_at(arguments.served)]
    return [] if names_device(arguments, "tapfs stats") else served_disks()


def _row(disk: _Disk) -> tuple[str, ...]:
    counted = disk.statistics or {}
    return (*disk.place, *(str(counted.get(name, "-")) for name in _COUNTERS.values()))
