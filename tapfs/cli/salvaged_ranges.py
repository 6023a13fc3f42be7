"""The words of a command about the ranges of a damaged disk that it could not read."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tapfs.jobs.sources import Salvaged

#: The exit code where zeros stand for what could not be read.
EXIT_SALVAGED = 1
#: So many ranges that could not be read are named; more would hide what else there is to see.
_MOST_NAMED = 50


def tell_lost(salvaged: Salvaged) -> int:
    """Say on stderr what could not be read; the exit code."""
    from tapfs.cli.guard import complain

    lost = salvaged.lost
    for (offset, length), error in lost[:_MOST_NAMED]:
        complain("tapfs", f"bytes {offset} to {offset + length} of the disk became zeros: {error}")
    if len(lost) > _MOST_NAMED:
        complain("tapfs", f"so did {len(lost) - _MOST_NAMED} further ranges")
    if lost:
        total = sum(length for (_, length), _ in lost)
        complain("tapfs", f"{total} bytes could not be read")
    return EXIT_SALVAGED if lost else 0
