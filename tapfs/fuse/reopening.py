"""Open the image of a mount, and open it again in the server that follows one that was killed."""

from __future__ import annotations

import os
import secrets
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tapfs.disk.opening import complete_left, open_image
from tapfs.errors import ErrorKind, ImageError
from tapfs.host.location import locate
from tapfs.records import dataclass, replace
from tapfs.serving.log import log

if TYPE_CHECKING:
    from tapfs.disk.chain import OpenOptions
    from tapfs.disk.image import Image
    from tapfs.disk.plan_log import PlanLog
    from tapfs.fuse.stored_mount import StoredMount

#: Seconds that requests of a dying predecessor, or another program's short look, may keep the image; between two tries.
_PATIENCE_SECONDS, _PAUSE_SECONDS = 90.0, 0.02

#: The place of the plan log before it has one. No plan is kept there, because nothing is written before the mount.
_NOWHERE = Path("/nonexistent")


@dataclass(slots=True)
class Reopening:
    """What opens the image of a mount. `options` are the user's; `password` is known once the image was open.

    With `keeps_plan` the plan log takes what a flush would write, so that a kill of the server loses nothing that was
    answered. It has no place before `begin`.
    """

    path: str
    options: OpenOptions
    keeps_plan: bool
    password: bytes | None = None
    plan_log: PlanLog | None = None

    def open(self, password: bytes | None) -> Image:
        """The image, for the first time. Raises ImageError."""
        if self.keeps_plan and (self.options.writable or self.options.overlaid):
            from tapfs.disk.plan_log import PlanLog

            self.plan_log = PlanLog(_NOWHERE, secrets.token_hex(16))
            self.options = replace(self.options, request_owner=self.plan_log.request_owner)
        image = open_image(self.path, self.options, password=password, plan_log=self.plan_log)
        self.password = password
        return image

    def follow(self, left: StoredMount, plan: Path, password: bytes | None) -> Image:
        """The image of a mount whose processes were all killed; its plan log is `plan` from now on. Raises ImageError.

        It is for looking at: the next server opens it again, once this one is closed.
        """
        if left.plan is not None:
            from tapfs.disk.plan_log import PlanLog

            with suppress(FileNotFoundError):
                left.plan.replace(plan)
            self.plan_log = PlanLog(plan, left.token)
            self.options = replace(self.options, request_owner=self.plan_log.request_owner, scratch=left.scratch)
        self.begin(plan)
        self.password = password
        return self.again()

    def begin(self, plan: Path) -> None:
        """Have the plan log there, and names that mean the same from any folder. Raises ImageError."""
        if self.plan_log is not None:
            self.plan_log.move(plan)
        options = self.options
        self.path = locate(self.path).absolute().name
        self.options = replace(
            options,
            overlay=options.overlay and os.path.abspath(options.overlay),
            backing=options.backing and locate(options.backing).absolute().name,
            parent_folders=tuple(os.path.abspath(folder) for folder in options.parent_folders),
            gate=options.gate.absolute(),
        )

    def hold(self, image: Image) -> None:
        """Keep what is open of the image and has no name, for those that open it again. Raises OSError."""
        if self.options.temporary and self.options.overlay is None:
            self.options = replace(self.options, scratch=os.dup(image.layers[0].file.descriptor))

    def again(self) -> Image:
        """The image, as it is with all that the killed server had answered. Raises ImageError."""
        give_up = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                return self._again()
            except ImageError as error:
                if error.kind is not ErrorKind.LOCKED or time.monotonic() > give_up:
                    raise
            time.sleep(_PAUSE_SECONDS)

    def _again(self) -> Image:
        if self.plan_log is not None and self.plan_log.exists:
            written = self.options.overlay or self.path
            if self.options.scratch is None:  # nobody else could change that
                self.plan_log.require_unchanged(written)
            plain = replace(self.options, writable=True, overlay=None, temporary=False)
            if complete_left(written, plain, self.plan_log):
                log.info("%s: completed what the last server had acknowledged", written)
        return open_image(self.path, self.options, password=self.password, plan_log=self.plan_log)
