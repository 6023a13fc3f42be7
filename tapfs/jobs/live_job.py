"""A job on a disk that is in use, as the front end that serves the disk sees it: commit, mirror.

The front end calls the methods in the order in which they stand here. "At rest" means that nobody reads or writes the
disk and that all is flushed. `run` takes long and needs no rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from tapfs.disk.image import Image
    from tapfs.jobs.live_copy import Progress


class LiveJob(Protocol):
    """One job. Methods block, and raise ImageError; `run` and `complete` also CopyEndedError, after `end`."""

    kind: str

    @property
    def progress(self) -> Progress | None:
        """How far it is, None before `begin`. Any thread may ask."""
        ...

    def begin(self, image: Image) -> Image:
        """At rest: the Image to serve from now on, which may be `image` itself; else that is to be abandoned."""
        ...

    def run(self) -> None:
        """Copy until little is left."""
        ...

    def end(self) -> None:
        """Have `run` raise CopyEndedError soon. Any thread may call it."""
        ...

    def complete(self) -> Image | None:
        """At rest: finish. The Image to serve from now on, if it is another; what it holds is durable."""
        ...

    def give_up_space(self) -> None:
        """After an error, at any moment: give back what space of the host can be given back without rest."""
        ...

    def undo(self) -> Image | None:
        """At rest, after an error: the Image to serve from now on, if it is another. The disk has lost nothing."""
        ...

    def close(self) -> None:
        """Let go of what the job has open, which nobody serves any more."""
        ...
