"""Requests of `tapfs umount` and `tapfs list` to the process that serves a mount, over its control socket.

`umount` (with `force`) is answered when the image is closed. An error that did not keep the mount is in `error` then.
If the mount stays, the answer is the error. The answer to `status` has the counters `bytes_read` and `bytes_written`.
That to `metrics` has the requests by kind, where native threads answer them (`tapfs.kernel.metrics`), the disk's size
and the engine's `statistics`. `scrub` (with `offset`) is a step of `tapfs.serving.scrubbing`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tapfs.errors import ImageError
from tapfs.serving.asking import ask_and_block, unknown_command
from tapfs.serving.disk_requests import number
from tapfs.serving.messages import error_from_data, error_to_data

#: For how long a listing waits for a process that may be stopped or stuck.
_STATUS_SECONDS = 1


class Mounted(Protocol):
    """The mount that is asked."""

    async def unmount(self, *, force: bool) -> ImageError | None:
        """Unmount and close the image; what went wrong all the same. Raises ImageError if the mount stays."""
        ...

    def status(self) -> Mapping[str, object]:
        """What is counted."""
        ...

    async def scrub(self, offset: int) -> Mapping[str, object]:
        """Read a part of the disk and compare it with the sidecar (`tapfs.serving.scrubbing`)."""
        ...

    def metrics(self) -> Mapping[str, object]:
        """What was asked for by kind, with histograms, and the size of the disk."""
        ...


class Unmounted(NamedTuple):
    """The mount is gone; `error` is what its flush or its end has met."""

    error: ImageError | None


async def answer(mount: Mounted, request: Mapping[str, Any]) -> Mapping[str, object]:
    """Carry out a request."""
    match request.get("command"):
        case "status":
            return mount.status()
        case "metrics":
            return mount.metrics()
        case "umount":
            error = await mount.unmount(force=bool(request.get("force")))
            return {"error": None if error is None else error_to_data(error)}
        case "scrub":
            return await mount.scrub(number(request, "offset") or 0)
        case _:
            raise unknown_command(request)


def ask_to_unmount(directory: Path, name: str, *, force: bool) -> Unmounted | None:
    """Ask the process behind a socket; None if it ended without an answer. Blocks until it has one.

    Raises the ImageError for which the mount stays, OSError if nobody listens.
    """
    said = ask_and_block(directory, name, "umount", force=force)
    if said is None:
        return None
    error = said.get("error")
    return Unmounted(None if error is None else error_from_data(error))


def ask_for_metrics(directory: Path, name: str) -> dict[str, Any]:
    """What the process behind a socket has measured; empty if it does not say."""
    with suppress(OSError):
        return ask_and_block(directory, name, "metrics", seconds=_STATUS_SECONDS) or {}
    return {}


def ask_for_status(directory: Path, name: str) -> dict[str, Any]:
    """What the process behind a socket has counted; empty if it does not say."""
    with suppress(OSError):  # also an ImageError: it is just ending
        return ask_and_block(directory, name, "status", seconds=_STATUS_SECONDS) or {}
    return {}
