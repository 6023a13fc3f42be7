"""Copy a disk that is in use into a new image, of any format and anywhere; then the disk may go on with the copy.

The copy appears under its name when it is the disk of one moment, complete and durable. Until then, and whatever
becomes of the copy, the disk is served from where it was. An error of the target ends the copy alone. Who goes on with
the copy (`pivots`) has the disk at rest while that is opened, so no write can go to the old image after that moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from tapfs.disk.chain import OpenOptions, is_encrypted, layer_of_files
from tapfs.disk.image import Image
from tapfs.disk.live import on_the_same_files
from tapfs.errors import ErrorKind, ImageError
from tapfs.jobs.create import NewImage, new_image
from tapfs.jobs.live_copy import LiveCopy, Progress
from tapfs.jobs.range_copy import Run

if TYPE_CHECKING:
    from tapfs.disk.plan_log import PlanLog


class LiveMirror:
    """One copy of a served image to the new image `path`: a `tapfs.jobs.live_job.LiveJob`.

    `overwrite`: it may replace what is there. `keeps_name`: the copy is served under the name of the disk. The rest is
    as for `LiveCommit`. A copy of an encrypted disk is encrypted by the same password.
    """

    kind = "mirror"

    def __init__(
        self,
        path: str,
        format_name: str,
        *,
        overwrite: bool = False,
        pivots: bool = False,
        keeps_name: bool = False,
        password: bytes | None = None,
        plan_log: PlanLog | None = None,
        rate: int | None = None,
        slow_down: Callable[[int | None], None] | None = None,
    ) -> None:
        self._path = path
        self._format = format_name
        self._overwrite = overwrite
        self._pivots = pivots
        self._keeps_name = keeps_name
        self._password = password
        self._plan_log = plan_log
        self._rate = rate
        self._slow_down = slow_down
        self._making = ExitStack()
        self._source: Image | None = None
        self._target: Image | None = None
        self._copy: LiveCopy | None = None

    @property
    def progress(self) -> Progress | None:
        """See `LiveJob.progress`."""
        return None if self._copy is None else self._copy.progress

    def begin(self, image: Image) -> Image:
        """See `LiveJob.begin`. The image itself goes on, with marks."""
        encrypted = is_encrypted(image.layers)
        new = NewImage(self._format, image.size, password=self._password if encrypted else None)
        self._source = image
        self._target = self._making.enter_context(new_image(self._path, new, overwrite=self._overwrite))
        if self._target.only_streamed or not self._target.writable:
            self._making.close()
            raise ImageError(
                ErrorKind.UNSUPPORTED,
                f"a {self._format} image of this kind is written from its first byte to its last only",
                path=self._path,
                op="mirror",
                remedy="mirror to another format, and convert that",
            )
        self._copy = LiveCopy(image, self._target, self._runs, rate=self._rate, slow_down=self._slow_down)
        return image

    def run(self) -> None:
        """See `LiveJob.run`. The target reads as zeros, so zeros are left out at first."""
        source, copy = self._begun
        copy.run(run for run in self._runs(0, source.size) if not run.zero)

    def end(self) -> None:
        """See `LiveJob.end`."""
        if self._copy is not None:
            self._copy.end()

    def complete(self) -> Image | None:
        """See `LiveJob.complete`. The copy has its name then; it is served if it `pivots`."""
        source, copy = self._begun
        copy.finish()
        if self._target is None:
            raise AssertionError("the copy has no target")
        layer = self._target.layers[0]
        if not self._pivots:
            self._making.close()
            return None
        for file in layer.files:
            file.request_owner = source.layers[0].file.request_owner
        direct = source.layers[0].file.direct
        name = source.path if self._keeps_name else self._path
        files = on_the_same_files(layer, name, writable=True, direct=direct)
        try:
            self._making.close()
        except BaseException:
            files.close()
            raise
        options = OpenOptions(format=self._format, writable=True, write_base=True)
        top = layer_of_files(name, files, options)
        try:
            image = Image(
                [top],
                writable=True,
                password=self._password,
                cache_bytes=source.cache_bytes,
                plan_log=self._plan_log,
            )
            _ = image.engine_disk
        except BaseException:
            top.close()
            raise
        return image

    def give_up_space(self) -> None:
        """See `LiveJob.give_up_space`. The target goes."""
        self.close()

    def undo(self) -> Image | None:
        """See `LiveJob.undo`."""
        if self._copy is not None:
            self._copy.abandon()
        return None

    def close(self) -> None:
        """See `LiveJob.close`. A target that is not complete goes."""
        error = CopyNotCompleteError()
        with suppress(CopyNotCompleteError):
            self._making.__exit__(type(error), error, None)

    @property
    def _begun(self) -> tuple[Image, LiveCopy]:
        if self._source is None or self._copy is None:
            raise AssertionError("the copy has not begun")
        return self._source, self._copy

    def _runs(self, offset: int, length: int) -> Iterator[Run]:
        source, _ = self._begun
        for extent in source.extents(offset, length):
            yield Run(extent.offset, extent.length, zero=extent.zero)


class CopyNotCompleteError(Exception):
    """Why a target is thrown away."""
