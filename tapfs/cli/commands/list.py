"""`tapfs list`: what this user has mounted, the disks of Xen guests, and the RAM disks of the host."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from tapfs.cli.json_output import print_json
from tapfs.cli.reporting import add_json_option, print_columns

if TYPE_CHECKING:
    import argparse

    from tapfs.cli.parser import Subparsers
    from tapfs.fuse.registry import MountEntry, Registry
    from tapfs.host.ram import RamDisk
    from tapfs.xen.toolstack.attached_disks import AttachedDisk

_COLUMNS = ("IMAGE", "MOUNT POINT", "SHOWS", "MODE", "FORMAT", "ENGINE", "READ", "WRITTEN", "PID")
_XEN_COLUMNS = ("ATTACHED", "DOMAIN", "VDEV", "MODE", "STATE", "READ", "WRITTEN", "PID")
_RAM_COLUMNS = ("RAM DISK", "SIZE", "TAKEN")

_DESCRIPTION = """\
List your mounts with the bytes that were read and written through them ('-': not known, for
the kernel serves the disk by itself), on a Xen host the disks of its guests, and the RAM disks of
this host with the bytes that they take. A mount whose process died is marked; 'tapfs umount' cleans
it up."""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "list", help="list mounted images, attached disks and RAM disks", description=_DESCRIPTION
    )
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print tables, or with --json an object with `mounts`, `ram_disks` and, on a Xen host, `attached`."""
    from tapfs.fuse.registry import Registry
    from tapfs.host.ram import ram_disks

    registry = Registry()
    entries = [(entry, _counted(registry, entry)) for entry in registry.entries()]
    attached = _attached()
    disks = ram_disks()
    if arguments.json:
        mounts = {"mounts": [_as_data(entry, counted) for entry, counted in entries]}
        guests = {} if attached is None else {"attached": [asdict(disk) for disk in attached]}
        print_json({**mounts, **guests, "ram_disks": [disk._asdict() for disk in disks]})
        return 0
    tables = [
        [_COLUMNS, *(_as_row(entry, counted) for entry, counted in entries)],
        [_XEN_COLUMNS, *(_attached_row(disk) for disk in attached or [])],
        [_RAM_COLUMNS, *(map(_ram_row, disks))],
    ]
    shown = [table for table in tables if len(table) > 1]
    for table in shown:
        if table is not shown[0]:
            print()
        print_columns(table)
    return 0


def _attached() -> list[AttachedDisk] | None:
    """The disks of guests; None where there is no Xen, or where it is not for this user to see."""
    from tapfs.cli.guard import complain
    from tapfs.errors import ErrorKind, ImageError
    from tapfs.xen.host import find_host

    try:
        find_host()
    except ImageError:
        return None
    from tapfs.cli.guests.device import with_xenstore
    from tapfs.xen.toolstack.attached_disks import attached_disks

    try:
        return with_xenstore(lambda store, _host: attached_disks(store))
    except ImageError as error:
        # What else there is to list is listed all the same.
        if error.kind is not ErrorKind.DENIED:
            complain("tapfs", f"the disks of guests are missing in this list: {error}")
        return None


def _counted(registry: Registry, entry: MountEntry) -> tuple[int | None, int | None]:
    """The bytes read and written through a mount, None where nobody knows."""
    from tapfs.fuse.control import ask_for_status

    said = ask_for_status(registry.directory, registry.socket_name(entry.pid)) if entry.alive else {}
    return said.get("bytes_read"), said.get("bytes_written")


def _as_row(entry: MountEntry, counted: tuple[int | None, int | None]) -> tuple[str, ...]:
    shows = entry.shows if entry.partition is None else f"{entry.shows} of partition {entry.partition}"
    pid = str(entry.pid) if entry.alive else f"{entry.pid} (dead)"
    read, written = ("-" if count is None else str(count) for count in counted)
    return (entry.image, entry.mountpoint, shows, entry.mode, entry.format, entry.engine, read, written, pid)


def _as_data(entry: MountEntry, counted: tuple[int | None, int | None]) -> dict[str, object]:
    data: dict[str, object] = asdict(entry)
    for internal in ("process_start", "device"):
        del data[internal]
    data.update(alive=entry.alive, bytes_read=counted[0], bytes_written=counted[1])
    return data


def _attached_row(disk: AttachedDisk) -> tuple[str, ...]:
    domain = str(disk.domain) if disk.domain_name is None else f"{disk.domain} ({disk.domain_name})"
    counted = disk.statistics or {}
    read, written = (str(counted.get(name, "-")) for name in ("read_bytes", "written_bytes"))
    pid = "-" if disk.pid is None else str(disk.pid)
    return (disk.spec, domain, disk.vdev, disk.mode, disk.summary, read, written, pid)


def _ram_row(disk: RamDisk) -> tuple[str, ...]:
    return (f"ram:{disk.name}", str(disk.size), str(disk.allocated))
