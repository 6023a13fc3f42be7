"""The files that damaged ranges belong to, as `check --files` and `verify --files` take and show them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from tapfs.cli.options import add_sector_size_option
from tapfs.cli.parser import size_argument
from tapfs.cli.reporting import print_line
from tapfs.extent import Range

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tapfs.jobs.damaged_files import DamagedPart
    from tapfs.partitions.owners.search import Owner

#: Lines of one partition that are printed; --json has all.
_MOST_PRINTED = 200
_PARTS = {
    "data": "data",
    "directory": "directory",
    "map": "where its data lies",
    "inode": "its own record",
    "metadata": "of the file system itself",
}


def add_files_options(parser: argparse.ArgumentParser) -> None:
    """Add --files, --range and --sector-size."""
    parser.add_argument(
        "--files", action="store_true", help="say which partitions and files lie in what is damaged, and in each RANGE"
    )
    parser.add_argument(
        "--range",
        dest="ranges",
        metavar="OFFSET:LENGTH",
        type=range_argument,
        action="append",
        default=[],
        help="with --files: a range of the disk that is known to be damaged; may be given again",
    )
    add_sector_size_option(parser)


def range_argument(text: str) -> Range:
    """A range of the disk for argparse."""
    start, colon, length = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"not OFFSET:LENGTH: {text!r}")
    return Range(size_argument(start), size_argument(length))


def print_files(parts: list[DamagedPart]) -> None:
    """The owners for people, by partition."""
    for part in parts:
        print_line(f"{_place(part)}:")
        lines = [f"  {_words(each.range)}: {_owner(each)}" for each in part.found.owners]
        lines += [f"  {_words(each)}: in no file that was found" for each in part.found.unowned]
        for line in lines[:_MOST_PRINTED]:
            print_line(line)
        if len(lines) > _MOST_PRINTED:
            print_line(f"  ... and {len(lines) - _MOST_PRINTED} more; --json has all")
        for note in part.found.notes:
            print_line(f"  note: {note}")


def files_as_json(parts: list[DamagedPart]) -> list[dict[str, object]]:
    """The owners for programs: one object for each name of each range."""
    return [entry for part in parts for entry in _entries(part)]


def _entries(part: DamagedPart) -> Iterator[dict[str, object]]:
    place = {"partition": part.partition, "file_system": part.type}
    for owner in part.found.owners:
        for name in owner.names or (None,):
            yield {**owner.range._asdict(), **place, "part": owner.part, "number": owner.number, "path": name}
    for each in part.found.unowned:
        yield {**each._asdict(), **place, "part": "none", "number": None, "path": None}


def _place(part: DamagedPart) -> str:
    if part.partition is None:
        return "outside all partitions" if part.type is None else f"the disk ({part.type})"
    return f"partition {part.partition} ({part.type or 'nothing known'})"


def _words(each: Range) -> str:
    return f"bytes {each.offset} to {each.end}"


def _owner(owner: Owner) -> str:
    named = ", ".join(owner.names) or f"number {owner.number}, which no directory names"
    return f"{named} ({_PARTS[owner.part]})"
