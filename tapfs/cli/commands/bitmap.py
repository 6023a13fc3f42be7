"""`tapfs bitmap`: the bitmaps in an image that say what has changed."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from tapfs.cli.json_output import print_json
from tapfs.cli.options import IMAGE_HELP
from tapfs.cli.parser import UsageError, format_argument, size_argument
from tapfs.cli.reporting import add_json_option, print_columns, print_line
from tapfs.cli.sizes import human_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tapfs.cli.parser import Subparsers
    from tapfs.disk.chain import OpenOptions
    from tapfs.driver import Bitmap

_PROGRAM = "tapfs bitmap"
_DESCRIPTION = """\
List the bitmaps that IMAGE keeps (qcow2), or change the bitmap NAME. A bitmap says which pieces of the disk have
changed since when: what an incremental backup has to copy. 'tapfs map --bitmap NAME' shows the ranges that it marks.
Several actions are done in the order in which they are said. Nobody else may use IMAGE meanwhile; interrupted at any
point, it has the bitmap as before or as wanted, with leaked space at worst."""


def add_parser(subparsers: Subparsers) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "bitmap", help="list or change the bitmaps of what has changed in an image", description=_DESCRIPTION
    )
    parser.add_argument("image", metavar="IMAGE", help=IMAGE_HELP)
    parser.add_argument("name", metavar="NAME", nargs="?", help="the bitmap to be changed")
    actions = parser.add_argument_group("what to do with NAME")
    helps = {
        "add": "make it; it marks nothing, and is enabled",
        "remove": "forget it, also where it is inconsistent",
        "clear": "have it mark nothing",
        "enable": "have it note what is written from now on",
        "disable": "have it stay as it is, whatever is written",
    }
    for word, text in helps.items():
        actions.add_argument(
            f"--{word}", dest="actions", action=_Action, const=word, nargs=0, default=argparse.SUPPRESS, help=text
        )
    actions.add_argument(
        "--merge",
        dest="actions",
        action=_Action,
        const="merge",
        metavar="SOURCE",
        default=argparse.SUPPRESS,
        help="have it also mark what the bitmap SOURCE marks",
    )
    parser.set_defaults(actions=())
    parser.add_argument(
        "-g",
        "--granularity",
        metavar="SIZE",
        type=size_argument,
        help="with --add: bytes of a piece, a power of two from 512 to 2G (default: a cluster, 4K to 64K)",
    )
    parser.add_argument("-b", "--source-file", metavar="FILE", help="with --merge: the image that has SOURCE")
    parser.add_argument("-F", "--source-format", metavar="FMT", type=format_argument, help="format of FILE")
    parser.add_argument("-f", "--format", metavar="FMT", type=format_argument, help="format of IMAGE")
    parser.add_argument("-U", "--force-share", action="store_true", help="list even while another process writes IMAGE")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors, and what was asked for")
    add_json_option(parser)
    parser.set_defaults(run=run)


class _Action(argparse.Action):
    """Adds what is to be done to a list, in the order of the command line."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        del parser, option_string
        done: tuple[tuple[str, str], ...] = getattr(namespace, "actions", ())
        namespace.actions = (*done, (str(self.const), values if isinstance(values, str) else ""))


def run(arguments: argparse.Namespace) -> int:
    """Change it, or list them; with --json what there is in the end."""
    from tapfs.disk.chain import OpenOptions
    from tapfs.host.lock import Sharing
    from tapfs.jobs.bitmaps import list_bitmaps

    _require_sense(arguments)
    options = OpenOptions(format=arguments.format)
    for action, source in arguments.actions:
        _do(arguments, options, action, source)
    if arguments.json or not arguments.actions:
        sharing = Sharing.UNCHECKED if arguments.force_share else Sharing.EXCLUSIVE
        found = list_bitmaps(arguments.image, OpenOptions(format=arguments.format, sharing=sharing))
        if arguments.json:
            print_json({"path": arguments.image, "bitmaps": [each._asdict() for each in found]})
        else:
            _print_table(arguments.image, found)
    return 0


def _require_sense(arguments: argparse.Namespace) -> None:
    """Raise UsageError for words that do not go together."""
    words = {action for action, _ in arguments.actions}
    if bool(words) != (arguments.name is not None):
        missing = "NAME is needed" if words else "say what to do with NAME: --add, --remove, --clear, ..."
        raise UsageError(missing, _PROGRAM)
    if arguments.granularity is not None and "add" not in words:
        raise UsageError("-g goes with --add", _PROGRAM)
    if arguments.source_file is not None and "merge" not in words:
        raise UsageError("-b goes with --merge", _PROGRAM)
    if arguments.source_format is not None and arguments.source_file is None:
        raise UsageError("-F is the format of -b FILE", _PROGRAM)


def _do(arguments: argparse.Namespace, options: OpenOptions, action: str, source: str) -> None:
    from tapfs.disk.chain import OpenOptions
    from tapfs.jobs import bitmaps

    path, name = arguments.image, arguments.name
    match action:
        case "add":
            bitmaps.add_bitmap(path, name, arguments.granularity, options)
        case "remove":
            bitmaps.remove_bitmap(path, name, options)
        case "clear":
            bitmaps.store_bitmap(path, name, (), options)
        case "merge":
            other = OpenOptions(format=arguments.source_format)
            bitmaps.merge_bitmap(path, name, source, options, source_path=arguments.source_file, source_options=other)
        case _:
            bitmaps.enable_bitmap(path, name, options, enabled=action == "enable")


def _print_table(path: str, found: Sequence[Bitmap]) -> None:
    if not found:
        print_line(f"{path}: no bitmaps")
        return
    rows: list[tuple[str, ...]] = [("NAME", "GRANULARITY", "ENABLED", "CONSISTENT")]
    for each in found:
        flags = ("yes" if flag else "no" for flag in (each.enabled, each.consistent))
        rows.append((each.name, human_size(each.granularity), *flags))
    print_columns(rows)
