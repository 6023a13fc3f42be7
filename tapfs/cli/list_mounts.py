"""`tapfs list`: what this user has mounted, and the RAM disks of the host."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from tapfs.cli.reporting import add_json_option, print_json, printable

if TYPE_CHECKING:
    import argparse

    from tapfs.cli.parser import Subparsers
    from tapfs.fuse.registry import MountEntry, Registry
    from tapfs.shared_ram import RamDisk

_COLUMNS = ("IMAGE", "MOUNT POINT", "SHOWS", "MODE", "FORMAT", "ENGINE", "READ", "WRITTEN", "PID")
_RAM_COLUMNS = ("RAM DISK", "SIZE", "TAKEN")

_DESCRIPTION = """\
List your mounts with the bytes that were read and written through them ('-': not known, for
the kernel serves the disk by itself), and the RAM disks of this host with the bytes that they
take. A mount whose process died is marked; 'tapfs umount' cleans it up."""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser("list", help="list mounted images and RAM disks", description=_DESCRIPTION)
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print tables, or with --json an object with `mounts` and `ram_disks`."""
    from tapfs.fuse.registry import Registry
    from tapfs.shared_ram import ram_disks

    registry = Registry()
    entries = [(entry, _counted(registry, entry)) for entry in registry.entries()]
    disks = ram_disks()
    if arguments.json:
        print_json(
            {
                "mounts": [_as_data(entry, counted) for entry, counted in entries],
                "ram_disks": [disk._asdict() for disk in disks],
            }
        )
        return 0
    if entries:
        _print_aligned([_COLUMNS, *(_as_row(entry, counted) for entry, counted in entries)])
    if entries and disks:
        print()
    if disks:
        _print_aligned([_RAM_COLUMNS, *(map(_ram_row, disks))])
    return 0


def _counted(registry: Registry, entry: MountEntry) -> tuple[int | None, int | None]:
    """The bytes read and written through a mount, None where nobody knows."""
    from tapfs.fuse.control import ask_for_status

    said = ask_for_status(registry.directory, registry.socket_name(entry.pid)) if entry.alive else {}
    return said.get("bytes_read"), said.get("bytes_written")


def _print_aligned(rows: list[tuple[str, ...]]) -> None:
    """Print rows with their columns aligned."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _as_row(entry: MountEntry, counted: tuple[int | None, int | None]) -> tuple[str, ...]:
    shows = entry.shows if entry.partition is None else f"{entry.shows} of partition {entry.partition}"
    pid = str(entry.pid) if entry.alive else f"{entry.pid} (dead)"
    read, written = ("-" if count is None else str(count) for count in counted)
    image, mountpoint = printable(entry.image), printable(entry.mountpoint)
    return (image, mountpoint, shows, entry.mode, entry.format, entry.engine, read, written, pid)


def _as_data(entry: MountEntry, counted: tuple[int | None, int | None]) -> dict[str, object]:
    data: dict[str, object] = asdict(entry)
    for internal in ("process_start", "device"):
        del data[internal]
    data.update(alive=entry.alive, bytes_read=counted[0], bytes_written=counted[1])
    return data


def _ram_row(disk: RamDisk) -> tuple[str, ...]:
    return (f"ram:{disk.name}", str(disk.size), str(disk.allocated))
