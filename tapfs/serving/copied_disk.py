"""A disk in use that a job may copy meanwhile: the job, its thread, and how far its users are slowed down for it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from tapfs.errors import ErrorKind, ImageError
from tapfs.jobs.live_copy import CopyEndedError
from tapfs.serving.disk_operations import RateLimit

if TYPE_CHECKING:
    from tapfs.disk.image import Image
    from tapfs.jobs.live_job import LiveJob


class CopiedDisk:
    """What a front end's disk has for jobs (`tapfs.serving.live_jobs`); a subclass says how a limit is applied.

    `image` is what is served, `limit` the operator's limit.
    """

    def __init__(self, image: Image, limit: RateLimit) -> None:
        self.image = image
        self.limit = limit
        #: A job that copies the disk meanwhile, and the lock that its thread holds while it copies.
        self.job: LiveJob | None = None
        self._copying = threading.Lock()
        #: Bytes a second that users may write while a job catches up, None for any.
        self._slowed: int | None = None

    def apply_limit(self) -> None:
        """Have what serves the disk keep to `bound`. Any thread may call it."""
        raise NotImplementedError

    def replace(self, image: Image) -> Image:
        """Serve another image from now on; only while it is paused. The old one, which is the caller's now."""
        raise NotImplementedError

    @property
    def bound(self) -> RateLimit:
        """What users may do in a second: the operator's limit, or that of a job."""
        if self._slowed is None:
            return self.limit
        least = min(self._slowed, self.limit.bytes) if self.limit.bytes else self._slowed
        return self.limit._replace(bytes=least)

    def set_limit(self, limit: RateLimit) -> None:
        """Limit the rate from now on."""
        self.limit = limit
        self.apply_limit()

    def slow_down(self, limit_bytes: int | None) -> None:
        """Limit the users further while a job catches up, None: no more. Any thread may call it."""
        self._slowed = limit_bytes
        self.apply_limit()

    def require_no_job(self) -> None:
        """Raise ImageError(locked) while the disk is being committed or mirrored."""
        job = self.job
        if job is not None:
            raise ImageError(
                ErrorKind.LOCKED,
                f"a {job.kind} of the disk is under way",
                path=self.image.path,
                op="change the disk",
                remedy=f"wait for its end, or end it: Ctrl-C in tapfs {job.kind}",
            )

    def run_job(self) -> None:
        """Have the job copy. Raises what ends it: CopyEndedError, too, if the disk is closed."""
        with self._copying:
            job = self.job
            if job is None:
                raise CopyEndedError
            job.run()

    def close_image(self) -> None:
        """End the job, if there is one, and close the image, which nobody uses any more."""
        # Who waits for the job's end sees from now on that it is not theirs any more.
        job, self.job = self.job, None
        if job is not None:
            job.end()
        with self._copying:  # the job's thread uses the image until then
            try:
                self.image.close()
            finally:
                if job is not None:
                    job.undo()
                    job.close()
