"""Flush an image every few seconds, so that a crash of the host takes little of a writer that never flushes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

import trio

from tapfs.serving.failures import failure_of, log_failure
from tapfs.serving.log import log
from tapfs.serving.worker import Worker

if TYPE_CHECKING:
    from tapfs.disk.image import Image

#: Seconds between looks for metadata that nobody has flushed.
_FLUSH_SECONDS = 5


async def flush_periodically(
    image: Callable[[], Image], worker: Worker, *, alone: AbstractAsyncContextManager[object], path: str
) -> None:
    """Flush what `image` gives, until cancelled. A flush that fails is logged and tried again.

    `alone` is held meanwhile, for front ends that may serve another image from one moment to the next. An error that
    stays the same is logged once, and so is its end.
    """
    met: str | None = None
    while True:
        await trio.sleep(_FLUSH_SECONDS)
        try:
            async with alone:
                served = image()
                if served.writable and served.unflushed_bytes:
                    await worker.run(served.flush)
        except Exception as error:  # noqa: BLE001  what was written must reach the disk later
            failure = failure_of(error, op="flush", path=path)
            if met != str(failure):
                log_failure(failure, "flushing in the background, which is tried again")
            met = str(failure)
        else:
            if met is not None:
                log.info("flushing in the background works again")
            met = None
