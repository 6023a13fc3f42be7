"""The tasks of a survey, as a worker process does them: list a folder, look at an image."""

from __future__ import annotations

from typing import cast

from tapfs.many.image_row import FileState, rows_of, unchanged
from tapfs.many.tasks import Task

#: The answer about an image whose files are as they were at the last survey.
SAME = "same"


def answer(task: Task) -> object:
    """Do one task: a listing, the rows of a file, or `SAME`."""
    if task.get("sandboxed") and not _confined:
        _confine()
    if task["do"] == "list":
        from tapfs.many.listing import listing_of

        return listing_of(cast("str", task["path"]), named=bool(task["named"]))
    known = cast("list[FileState] | None", task.get("known"))
    if known is not None and unchanged(known):
        return SAME
    return rows_of(task)


#: Whether this process has given up its rights.
_confined = False


def _confine() -> None:
    """Give up all that looking at local images does not need: this process reads, and writes scratch files only."""
    global _confined  # noqa: PLW0603  the sandbox is of the process
    from tapfs.host.sandbox import rules
    from tapfs.host.sandbox.confinement import Needs, enter, is_entered

    if not is_entered():
        # The bound of memory is the pool's.
        enter(Needs(anything=rules.READING, scratch=True, keeps_scratch=True, cache_bytes=None))
    _confined = True
