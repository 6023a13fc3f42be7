"""Output that several commands share: JSON, names, aligned tables; and the options for progress."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from tapfs.errors import printable
from tapfs.records import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tapfs.cli.progress import Progress

#: Of a terminal, in characters.
_WIDTH = 80


def print_line(text: str) -> None:
    """One line on standard output, whatever the names in it hold."""
    print(printable(text))


def count_of(number: int, thing: str) -> str:
    """As in "1 error" and "2 errors"."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def print_table(rows: Iterable[tuple[str, str]]) -> None:
    """Labels and values, the values aligned."""
    lines = list(rows)
    width = max((len(label) for label, _ in lines), default=0) + 2
    for label, value in lines:
        print_line(f"{label + ':' if label else '':<{width}}{value}")


def print_columns(rows: Iterable[tuple[str, ...]]) -> None:
    """Rows with their columns aligned."""
    lines = [tuple(map(printable, row)) for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


class Record(NamedTuple):
    """A thing, what it is of, and facts about it."""

    name: str
    source: str
    facts: list[str]


def print_records(title: str, records: Sequence[Record]) -> None:
    """Records under a title, none without records. No line is longer than 80 characters but for a long name."""
    if not records:
        return
    print(f"{title}:")
    for name, source, facts in records:
        head = f"  {printable(name)}: {printable(source)}"
        print_lines([head] if len(head) <= _WIDTH else [f"  {printable(name)}:", f"    {printable(source)}"])
        line = ""
        for fact in facts:
            longer = f"{line}, {fact}" if line else f"    {fact}"
            if line and len(longer) >= _WIDTH:  # a comma comes behind it
                print_line(f"{line},")
                longer = f"    {fact}"
            line = longer
        if line:
            print_line(line)


def print_lines(lines: Sequence[str]) -> None:
    """Lines on standard output, whatever the names in them hold."""
    for line in lines:
        print_line(line)


def add_json_option(parser: argparse.ArgumentParser, *, file: str | None = None) -> None:
    """Add --json, and qemu-img's way to say it. `file`: --output may name a file, too, and this is the help of that."""
    parser.add_argument("--json", action="store_true", help="print JSON")
    if file is not None:
        parser.add_argument("--output", metavar="FILE", action=_Output, help=f"{file}; --output=json is --json")
        return
    parser.add_argument(
        "--output", choices=["human", "json"], action=_Output, default=argparse.SUPPRESS, help="--output=json is --json"
    )


class _Output(argparse.Action):
    """`--output=json` sets what `--json` sets; a name that is no form of output is that of a file."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        del parser, option_string
        namespace.json = values == "json"
        if values not in {"json", "human"}:
            namespace.output = values


def add_progress_options(parser: argparse.ArgumentParser) -> None:
    """Add -p, -q and --progress."""
    parser.add_argument("-p", action="store_true", help="show the progress bar at once, not after a second")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    parser.add_argument(
        "--progress",
        choices=["auto", "json", "none"],
        default="auto",
        help="auto: a bar if stderr is a terminal; json: lines on stderr (default: %(default)s)",
    )


def progress_of(arguments: argparse.Namespace, operation: str, *, unit: str = "bytes") -> Progress:
    """The progress that the options ask for."""
    from tapfs.cli.progress import Progress, ProgressMode

    mode = ProgressMode.NONE if arguments.quiet else ProgressMode(arguments.progress)
    return Progress(operation, mode, early=arguments.p, unit=unit)
