"""Commit and mirror of a disk while somebody uses it: one job at a time, between other operations.

The job's own steps are in tapfs/jobs. What happens here: the disk is brought to rest for some of them, it is noted what
the disk's name means before the disk goes on with another image, and an error leaves the disk as it was.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from tapfs.disk.leaf import pass_name_down, point_name_at, require_name_can_point, require_name_passes_down
from tapfs.disk.password import given_password
from tapfs.errors import ErrorKind, ImageError
from tapfs.host.base_marks import forget_overlay
from tapfs.jobs.live_commit import LiveCommit
from tapfs.jobs.live_copy import CopyEndedError
from tapfs.jobs.live_mirror import LiveMirror
from tapfs.serving import disk_requests
from tapfs.serving.disk_requests import number, said, text
from tapfs.serving.log import log
from tapfs.serving.threads import in_thread

if TYPE_CHECKING:
    from tapfs.disk.image import Image
    from tapfs.disk.plan_log import PlanLog
    from tapfs.jobs.live_job import LiveJob
    from tapfs.serving.copied_disk import CopiedDisk
    from tapfs.serving.disk_operations import DiskOperations

#: Seconds between two looks whether requests have found space.
_SPACE_SECONDS = 0.5


class LiveJobs:
    """The long jobs on one disk. All raise ImageError, and then the disk is as it was."""

    def __init__(
        self,
        operations: DiskOperations,
        disk: CopiedDisk,
        plan_log: PlanLog,
        *,
        key_file: str | Sequence[str] | None,
    ) -> None:
        self._operations = operations
        self._disk = disk
        self._plan_log = plan_log
        self._key_file = key_file

    async def answer(self, request: Mapping[str, Any]) -> Mapping[str, object]:
        """Carry out a request of an operator (`tapfs.serving.disk_requests`), about a job or any other."""
        match request.get("command"):
            case "commit":
                return await self.commit(rate=number(request, "rate"), keep_names=said(request, "keep_names"))
            case "mirror":
                return await self.mirror(
                    text(request, "file"),
                    text(request, "format"),
                    rate=number(request, "rate"),
                    overwrite=said(request, "overwrite"),
                    pivot=said(request, "pivot"),
                    keep_names=said(request, "keep_names"),
                )
            case "job":
                return self.status()
            case "cancel":
                self.cancel()
            case _:
                return await disk_requests.answer(self._operations, request)
        return {}

    def status(self) -> dict[str, object]:
        """The job that is under way: its kind, and how far it is (`tapfs.jobs.live_copy.Progress`)."""
        job = self._disk.job
        if job is None:
            return {"job": None}
        progress = job.progress
        return {"job": job.kind, **({} if progress is None else progress._asdict())}

    def cancel(self) -> None:
        """Have the job end with an error, if one is under way."""
        if self._disk.job is not None:
            self._disk.job.end()

    async def commit(self, *, rate: int | None, keep_names: bool) -> dict[str, object]:
        """Write what the overlay holds into its base; then the disk is the base alone, under the name of the disk.

        With `keep_names` the base keeps its own name and the overlay its own, empty.
        """
        job = LiveCommit(
            password=given_password(self._key_file),
            plan_log=self._plan_log,
            rate=rate,
            empties=keep_names,
            slow_down=self._disk.slow_down,
        )

        async def check(image: Image) -> None:
            if not keep_names and len(image.layers) > 1:
                await in_thread(partial(require_name_passes_down, image, told=self._operations.told(image)))

        async def settle(now: Image) -> None:
            overlay = self._disk.image
            if keep_names:
                await self._operations.note_image(now)
                forget_overlay(job.base.descriptor, overlay.path)
                return
            told = self._operations.told(overlay)
            await self._operations.note_exchange(self._disk.image, now)
            await in_thread(partial(pass_name_down, overlay, job.base, job.base_format, told=told))

        await self._done(job, check, settle)
        now = self._disk.image
        log.info("committed: %s is the disk, over %s", now.path, ", ".join(now.parents) or "nothing")
        return {**_result(job), "base": now.path}

    async def mirror(
        self, file: str, format_name: str, *, rate: int | None, overwrite: bool, pivot: bool, keep_names: bool
    ) -> dict[str, object]:
        """Copy the disk, as it is at the end of the copy, to the new image `file`; with `pivot` that is the disk then.

        The disk's name leads to the copy after a pivot, and the old image has the name with `.mirrored` behind it. With
        `keep_names` both keep their names.
        """
        if not os.path.isabs(file):
            raise ImageError(ErrorKind.INVALID_FORMAT, "is no absolute path", path=file, op="mirror")
        renames = pivot and not keep_names
        job = LiveMirror(
            file,
            format_name,
            overwrite=overwrite,
            pivots=pivot,
            keeps_name=renames,
            password=given_password(self._key_file),
            plan_log=self._plan_log,
            rate=rate,
            slow_down=self._disk.slow_down,
        )

        async def check(image: Image) -> None:
            if pivot and not image.writable:
                raise ImageError(ErrorKind.READ_ONLY, "was attached read-only", path=image.path, op="mirror")
            if renames:
                told = self._operations.told(image)
                await in_thread(partial(require_name_can_point, image, file, format_name, told=told))

        async def settle(now: Image) -> None:
            if keep_names:
                await self._operations.note_image(now)
                return
            told = self._operations.told(self._disk.image)
            await self._operations.note_exchange(self._disk.image, now)
            await in_thread(partial(point_name_at, self._disk.image, now, file, told=told))

        await self._done(job, check, settle)
        log.info("mirrored to %s%s", file, ", which is the disk from now on" if pivot else "")
        return _result(job)

    async def _done(
        self,
        job: LiveJob,
        check: Callable[[Image], Awaitable[None]],
        settle: Callable[[Image], Awaitable[None]],
    ) -> None:
        """Do the job, unless `check` refuses it; `settle` has a successor find the Image to be served from now on."""
        async with self._operations.alone():
            self._operations.require_no_job()
            self._operations.require_taken_over()
            image = self._disk.image
            await check(image)
            await in_thread(image.flush)  # what takes long comes before anybody has to wait
            await self._begin(job, image)
        try:
            await in_thread(self._disk.run_job)
            async with self._operations.alone(), self._operations.at_rest():
                await self._complete(job, settle)
        except BaseException as error:
            # Not shielded. Who cancels has closed the disk, and keeps the lock of its operations for good.
            await self._undo(job)
            if isinstance(error, CopyEndedError):
                raise ImageError(
                    ErrorKind.IO, "was ended before it was done", path=self._disk.image.path, op=job.kind
                ) from error
            raise

    async def _begin(self, job: LiveJob, image: Image) -> None:
        try:
            await self._operations.refuse_others()
            async with self._operations.at_rest():
                try:
                    self._serve(await in_thread(partial(job.begin, image)))
                except BaseException:
                    await in_thread(job.close)
                    raise
                self._disk.job = job
        except BaseException:
            self._operations.let_others_in()
            raise

    async def _complete(self, job: LiveJob, settle: Callable[[Image], Awaitable[None]]) -> None:
        self._require_open()
        now = await in_thread(job.complete)
        if now is not None:
            try:
                await settle(now)
            except BaseException:
                now.abandon()
                raise
            self._serve(now)
        self._disk.job = None
        self._operations.let_others_in()
        await in_thread(job.close)

    async def _undo(self, job: LiveJob) -> None:
        """Have the disk as it was. Who closes the disk meanwhile closes the job, too."""
        if self._disk.job is job:
            await in_thread(job.give_up_space)
        while self._disk.job is job:
            try:
                async with self._operations.alone(), self._operations.at_rest():
                    if self._disk.job is job:
                        await self._undo_at_rest(job)
            except ImageError:
                if self._disk.job is not job:
                    raise
                # Requests wait for space: the disk cannot come to rest before.
                await trio.sleep(_SPACE_SECONDS)

    async def _undo_at_rest(self, job: LiveJob) -> None:
        try:
            before = await in_thread(job.undo)
            if before is not None:
                self._serve(before)
        finally:
            self._disk.job = None
            self._operations.let_others_in()
            await in_thread(job.close)

    def _serve(self, image: Image) -> None:
        if image is not self._disk.image:
            self._disk.replace(image).abandon()

    def _require_open(self) -> None:
        if self._disk.image.closed:
            raise ImageError(ErrorKind.IO, "is closed", path=self._disk.image.path, op="go on")


def _result(job: LiveJob) -> dict[str, object]:
    progress = job.progress
    return {} if progress is None else {"data_bytes": progress.data_bytes, "passes": progress.passes}
