"""`tapfs snapshot`: the snapshots inside an image."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from tapfs.cli.json_output import print_json
from tapfs.cli.options import IMAGE_HELP, add_write_base_option
from tapfs.cli.parser import format_argument
from tapfs.cli.reporting import add_json_option, print_columns, print_line
from tapfs.cli.sizes import human_size

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from tapfs.cli.parser import Subparsers
    from tapfs.driver import SnapshotRecord

_DESCRIPTION = """\
List, create, apply or delete the snapshots that IMAGE keeps beside its current disk (qcow2). Nobody else may use
IMAGE meanwhile. Interrupted at any point, the image reads as before or as wanted; it may have leaked space then, or
be marked as dirty, which 'tapfs repair' mends. 'tapfs info', 'map', 'compare', 'convert' and 'mount' read a snapshot
with --snapshot NAME. A snapshot of a running guest's disk is 'tapfs swap'."""


def add_parser(subparsers: Subparsers) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "snapshot", help="list, create, apply or delete the snapshots in an image", description=_DESCRIPTION
    )
    parser.add_argument("image", metavar="IMAGE", help=IMAGE_HELP)
    wish = parser.add_mutually_exclusive_group()
    wish.add_argument("-l", "--list", action="store_true", help="list them (the default)")
    wish.add_argument("-c", "--create", metavar="NAME", help="keep the disk as it is now under NAME")
    wish.add_argument(
        "-a",
        "--apply",
        metavar="NAME",
        help="make the disk what the snapshot with that name or id holds; what the disk held is lost",
    )
    wish.add_argument("-d", "--delete", metavar="NAME", help="forget the snapshot with that name or id")
    parser.add_argument("-f", "--format", metavar="FMT", type=format_argument, help="format of IMAGE")
    add_write_base_option(parser.add_argument)
    parser.add_argument(
        "-U", "--force-share", action="store_true", help="list even while another process writes the image"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors, and what was asked for")
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Change them, or print them; with --json what there is in the end."""
    from tapfs.disk.chain import OpenOptions
    from tapfs.host.lock import Sharing
    from tapfs.jobs import snapshots

    path: str = arguments.image
    options = OpenOptions(format=arguments.format, write_base=arguments.write_base)
    changed = True
    if arguments.create is not None:
        snapshots.create_snapshot(path, arguments.create, options)
    elif arguments.apply is not None:
        snapshots.apply_snapshot(path, arguments.apply, options)
    elif arguments.delete is not None:
        snapshots.delete_snapshot(path, arguments.delete, options)
    else:
        changed = False
    if arguments.json or not changed:
        sharing = Sharing.UNCHECKED if arguments.force_share else Sharing.EXCLUSIVE
        found = snapshots.list_snapshots(path, OpenOptions(format=arguments.format, sharing=sharing))
        _print_json(path, found) if arguments.json else _print_table(path, found)
    return 0


def _print_json(path: str, found: Sequence[SnapshotRecord]) -> None:
    print_json({"path": path, "snapshots": [each._asdict() for each in found]})


def _print_table(path: str, found: Sequence[SnapshotRecord]) -> None:
    if not found:
        print_line(f"{path}: no snapshots")
        return
    rows: list[tuple[str, ...]] = [("ID", "NAME", "CREATED", "DISK", "VM STATE", "VM CLOCK")]
    for each in found:
        created = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each.seconds))
        state = (human_size(each.state_bytes), clock_text(each.clock_nanoseconds)) if each.state_bytes else ("-", "-")
        rows.append((each.id, each.name or "-", created, human_size(each.virtual_size), *state))
    print_columns(rows)


def clock_text(nanoseconds: int) -> str:
    """As in 00:01:05.250: hours, minutes, seconds."""
    seconds, rest = divmod(nanoseconds // 1_000_000, 1000)
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes // 60:02}:{minutes % 60:02}:{seconds:02}.{rest:03}"
