"""Commit an overlay into its base while the overlay is used; then the disk goes on with the base alone.

The front end does the steps, and has the disk at rest (nobody reads or writes, all is flushed) for each that says so:

1. `begin`, at rest: the base is open for writing below the overlay (`tapfs.disk.writable_base`), and the overlay names
   it by the identity that it has then (`tapfs.jobs.kept_link`);
2. `run`: what the overlay holds is copied to the base, and copied again where the guest has written meanwhile;
3. `complete`, at rest: the rest is copied, and the base is durable. The base is the whole disk from now on;
4. the front end has whoever opens the disk's name find the base (`tapfs.disk.leaf.pass_name_down`), then serves it.

On the platter the overlay lies over its base until 4, and has all that it had. The base is only written where the
overlay hides it, so what the two read as stays the same, whatever ends the process or the host. What a guest has not
flushed may be lost with a host. Where the overlay's map for it is lost and the base has a copy, the guest reads what it
had written. After a crash before 4 the commit is begun anew; nothing has to be undone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from tapfs.disk.writable_base import WithBase, base_alone, with_writable_base, without_writable_base
from tapfs.driver import Uncovering
from tapfs.errors import ErrorKind, ImageError
from tapfs.jobs.commit import EMPTYING_BYTES, free_places
from tapfs.jobs.kept_link import begin_matching
from tapfs.jobs.live_copy import LiveCopy, Progress
from tapfs.jobs.range_copy import Run

if TYPE_CHECKING:
    from tapfs.disk.image import Image
    from tapfs.disk.plan_log import PlanLog
    from tapfs.host.file import LocalFile


class LiveCommit:
    """One commit of a served image: a `tapfs.jobs.live_job.LiveJob`.

    `plan_log` is that of the disk, `rate` bounds the bytes a second, `slow_down` as for LiveCopy. With `empties` the
    overlay is emptied in the end, so that it may stay under its name.
    """

    kind = "commit"

    def __init__(
        self,
        *,
        password: bytes | None = None,
        plan_log: PlanLog | None = None,
        rate: int | None = None,
        empties: bool = False,
        slow_down: Callable[[int | None], None] | None = None,
    ) -> None:
        self._password = password
        self._plan_log = plan_log
        self._rate = rate
        self._empties = empties
        self._slow_down = slow_down
        self._images: WithBase | None = None
        self._copy: LiveCopy | None = None

    @property
    def progress(self) -> Progress | None:
        """See `LiveJob.progress`."""
        return None if self._copy is None else self._copy.progress

    @property
    def base(self) -> LocalFile:
        """The open file of the base."""
        return self._open.base.layers[0].file

    @property
    def base_format(self) -> str:
        """The format of the base."""
        return self._open.base.format_name

    def begin(self, image: Image) -> Image:
        """See `LiveJob.begin`."""
        top = image.layers[0].driver
        if self._empties and not (isinstance(top, Uncovering) and top.can_uncover):
            raise ImageError(
                ErrorKind.UNSUPPORTED,
                f"tapfs cannot empty this {top.format_name} overlay, so its name has to pass to the base",
                path=image.path,
                op="commit",
            )
        image.end_writing()
        images = with_writable_base(image, begin_matching, password=self._password, plan_log=self._plan_log)
        try:
            self._images = images
            self._copy = LiveCopy(images.served, images.base, self._hidden, rate=self._rate, slow_down=self._slow_down)
        except BaseException:
            images.abandon()
            raise
        return images.served

    def run(self) -> None:
        """See `LiveJob.run`."""
        self._running.run(self._hidden(0, self._open.served.size))

    def end(self) -> None:
        """See `LiveJob.end`."""
        if self._copy is not None:
            self._copy.end()

    def complete(self) -> Image:
        """See `LiveJob.complete`. The base alone, under the name of the overlay, or of its own with `empties`."""
        images = self._open
        served, base = images
        self._running.finish()
        base.end_writing()
        if self._empties:
            for offset in range(0, served.size, EMPTYING_BYTES):
                served.uncover(offset, min(EMPTYING_BYTES, served.size - offset))
        served.end_writing()
        if self._empties:
            free_places(served.layers[0])
        name = base.path if self._empties else served.path
        return base_alone(images, name, password=self._password, plan_log=self._plan_log)

    def give_up_space(self) -> None:
        """See `LiveJob.give_up_space`. The base keeps what it has: the next commit needs it."""

    def undo(self) -> Image | None:
        """See `LiveJob.undo`."""
        images = self._open
        self._running.abandon()
        images.base.end_writing()
        if images.served.closed:
            return None
        images.served.end_writing()
        return without_writable_base(images, password=self._password, plan_log=self._plan_log)

    def close(self) -> None:
        """See `LiveJob.close`."""
        if self._images is not None:
            self._images.abandon()

    @property
    def _open(self) -> WithBase:
        if self._images is None:
            raise AssertionError("the commit has not begun")
        return self._images

    @property
    def _running(self) -> LiveCopy:
        if self._copy is None:
            raise AssertionError("the commit has not begun")
        return self._copy

    def _hidden(self, offset: int, length: int) -> Iterator[Run]:
        """What the overlay decides of a range: that hides the base, which may be written there."""
        for extent in self._open.served.extents(offset, length):
            if extent.depth == 0:
                yield Run(extent.offset, extent.length, zero=extent.zero)
