"""The tasks of a survey, as a worker process does them: list a folder, look at an image."""

from __future__ import annotations

from functools import partial
from typing import cast

from tapfs.host.remote.address import Address
from tapfs.many.image_row import FileState, rows_of, unchanged
from tapfs.many.own_process import done_alone
from tapfs.many.tasks import Task

#: The answer about an image whose files are as they were at the last survey.
SAME = "same"


def answer(task: Task) -> object:
    """Do one task: a listing, the rows of a file, or `SAME`."""
    if task.get("sandboxed"):
        places = elsewhere(task)
        if places:
            # A process that has given up the network does not get it back for the next image.
            return done_alone(partial(_alone, task, places))
        if not _confined:
            _confine()
    return _done(task)


def elsewhere(task: Task) -> list[str]:
    """The addresses among what the task names: the image, or the folders that it may name others in."""
    roots = cast("list[str] | None", task.get("roots")) or []
    return [place for place in (cast("str", task["path"]), *roots) if Address.parse(place) is not None]


def _alone(task: Task, places: list[str]) -> object:
    """Do a task with addresses: a listing has the network and sees no image, a look is the other way round."""
    from tapfs.host.remote.starter import enter_beside
    from tapfs.host.sandbox import rules
    from tapfs.host.sandbox.confinement import Needs, enter
    from tapfs.host.sandbox.filter import Calls

    needs = Needs(anything=rules.READING, scratch=True, keeps_scratch=True, cache_bytes=None)
    if task["do"] == "list":
        enter(needs._replace(calls=Calls(network=True, programs=True)))
    else:
        enter_beside(needs, places)
    return _done(task)


def _done(task: Task) -> object:
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
