"""`tapfs formats`: the formats there are, and what each can do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.cli.json_output import print_json
from tapfs.cli.reporting import add_json_option, print_columns

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

    from tapfs.cli.parser import Subparsers
    from tapfs.driver import Format

_DESCRIPTION = """\
List the formats that -f and -O take, with what tapfs can do with each: write its images in place,
create them, over a parent (backing), compressed (packed) or encrypted, check and repair them, read
the snapshots in them, resize them. Every format listed can be read. '-': a driver of another package
that does not say. 'tapfs create -f FMT -o help' lists the options of a format."""

#: Headings that are shorter than their key, so that the table fits a terminal of 80 columns.
_HEADINGS = {"snapshots": "SNAP", "backing": "PARENT", "compress": "PACK", "encrypt": "CRYPT"}


def add_parser(subparsers: Subparsers) -> None:
    """Describe the command."""
    parser = subparsers.add_parser("formats", help="list the formats and what each can do", description=_DESCRIPTION)
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print a table, or with --json an object with `formats`."""
    from tapfs.disk.probe import format_named, format_names

    described = [_described(format_named(name)) for name in format_names()]
    if arguments.json:
        print_json({"formats": described})
        return 0
    abilities = [key for key in described[0] if key not in ("name", "options")]
    rows = [(str(each["name"]), *(_word(each[key]) for key in abilities)) for each in described]
    print_columns([("FORMAT", *(_HEADINGS.get(key, key.upper()) for key in abilities)), *rows])
    return 0


def _described(found: Format) -> dict[str, object]:
    from tapfs.driver import Ability, CreatableFormat, DescribedFormat

    said = found.abilities if isinstance(found, DescribedFormat) else None
    options: Mapping[str, str] = found.create_options if isinstance(found, CreatableFormat) else {}
    abilities = {str(ability): None if said is None else ability in said for ability in Ability}
    return {
        "name": found.name,
        "read": True,
        "write": abilities.pop(Ability.WRITE),
        "create": isinstance(found, CreatableFormat),
        **abilities,
        "options": dict(options),
    }


def _word(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else "-"
