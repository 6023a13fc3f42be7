"""Open the image of a virtual machine's disk so that a kill of its server loses nothing that the guest was told.

A guest goes on when the server is killed, and expects from the next one every write that was answered. The data of
those writes is in the host's files. The metadata that points to it is in the plan of the next flush, which is kept in
the runtime directory (`tapfs.disk.plan_log`). The next server executes that plan before it opens the image.

Nothing else may have changed the image in between. The server says every two seconds by the time of the plan's file
that it lives. An image that was changed more than ten seconds after the last of these times was changed by somebody
else. Then the plan is not executed, and the image is not opened before somebody has removed the plan.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from tapfs.disk.opening import complete_left
from tapfs.disk.plan_log import PlanLog
from tapfs.records import replace
from tapfs.serving.log import log
from tapfs.serving.runtime_directory import make_private, runtime_directory

if TYPE_CHECKING:
    from tapfs.disk.chain import OpenOptions

#: Changes with each boot of the host, whose crash takes the plan and the data together.
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class KeptPlanOf:
    """The plan log of the image that is written at `path`, which may not be there yet. Raises ImageError."""

    def __init__(self, path: str) -> None:
        directory = runtime_directory()
        make_private(directory)
        self._image = path
        name = hashlib.blake2b(os.fsencode(os.path.realpath(path)), digest_size=12).hexdigest()
        boot = _BOOT.read_bytes() if _BOOT.exists() else b""
        self.log = PlanLog(
            directory / f"vhost-{name}.plan", hashlib.blake2b(boot + name.encode(), digest_size=16).hexdigest()
        )

    def complete(self, options: OpenOptions) -> None:
        """Execute what a killed server has left. `options` are those of the image. Raises ImageError."""
        if not self.log.exists:
            return
        self.log.require_unchanged(self._image)
        if complete_left(self._image, replace(options, writable=True, overlay=None, temporary=False), self.log):
            log.info("completed what the last server had acknowledged")

    def beat(self) -> None:
        """Say that the server lives."""
        self.log.beat()

    def close(self) -> None:
        """Let go of the file, which goes if it holds no plan."""
        self.log.close()
