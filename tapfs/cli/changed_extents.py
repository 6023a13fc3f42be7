"""Print ranges of a disk that have changed, as a table or as JSON, one by one: there may be any number of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from tapfs.cli.json_output import begin_document
from tapfs.cli.reporting import print_line
from tapfs.disk.json_text import VERSION

_COLUMNS = "{:<16} {:<16} {}"


class Sums(NamedTuple):
    """Bytes of data and of zeros in all ranges."""

    data_bytes: int
    zero_bytes: int


def extents_table(extents: Iterable[tuple[int, int, bool]], *, quiet: bool = False) -> Sums:
    """A line for each ``(offset, length, zero)``, under a heading that `quiet` leaves out; the sums are not printed."""
    sums = {False: 0, True: 0}
    if not quiet:
        print_line(_COLUMNS.format("Offset", "Length", "New"))
    for offset, length, zero in extents:
        sums[zero] += length
        print_line(_COLUMNS.format(f"{offset:#x}", f"{length:#x}", "zeros" if zero else "data"))
    return Sums(sums[False], sums[True])


def extents_json(
    first: Mapping[str, object], extents: Iterable[tuple[int, int, bool]], last: Mapping[str, object] | None = None
) -> None:
    """A document with the keys `first`, then `extents` with an object each, then their sums, then the keys `last`."""
    begin_document()
    sums = {False: 0, True: 0}
    between = ""
    sys.stdout.write(f'{{"version": {VERSION}{_keys(first)}, "extents": [')
    for offset, length, zero in extents:
        sums[zero] += length
        is_zero = "true" if zero else "false"
        sys.stdout.write(f'{between}\n  {{"offset": {offset}, "length": {length}, "zero": {is_zero}}}')
        between = ","
    after = {"data_bytes": sums[False], "zero_bytes": sums[True], **(last or {})}
    sys.stdout.write(f"]{_keys(after)}}}\n")


def _keys(values: Mapping[str, object]) -> str:
    return "".join(f", {json.dumps(name)}: {json.dumps(value)}" for name, value in values.items())
