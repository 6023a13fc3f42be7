"""`tapfs list`: what this user has mounted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.cli.reporting import add_json_option, print_json, printable

if TYPE_CHECKING:
    import argparse

    from tapfs.cli.parser import Subparsers
    from tapfs.fuse.registry import MountEntry

_COLUMNS = ("IMAGE", "MOUNT POINT", "MODE", "FORMAT", "PID")


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "list",
        help="list the mounted images",
        description="List your mounts. One whose process died is marked; 'tapfs umount' cleans it up.",
    )
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print a table, or with --json an array."""
    from tapfs.fuse.registry import Registry

    entries = Registry().entries()
    if arguments.json:
        print_json([_as_data(entry) for entry in entries])
    elif entries:
        _print_aligned([_COLUMNS, *(_as_row(entry) for entry in entries)])
    return 0


def _print_aligned(rows: list[tuple[str, ...]]) -> None:
    """Print rows with their columns aligned."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _as_row(entry: MountEntry) -> tuple[str, ...]:
    pid = str(entry.pid) if entry.alive else f"{entry.pid} (dead)"
    return (printable(entry.image), printable(entry.mountpoint), entry.mode, entry.format, pid)


def _as_data(entry: MountEntry) -> dict[str, object]:
    return {
        "image": entry.image,
        "mountpoint": entry.mountpoint,
        "mode": entry.mode,
        "format": entry.format,
        "engine": entry.engine,
        "pid": entry.pid,
        "alive": entry.alive,
        "started": entry.started,
    }
