"""A thread that has the host write back what a copy has written, while the copy goes on: the flush finds little left.

Without it the host keeps gigabytes in memory, and their places on the disk are found only in the flush. Nothing is
made durable here, and no order is promised: barriers do both, and they report what the host could not write.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from tapfs.kernel.engine import EngineDisk

#: The host is told after so many bytes: fewer are not worth a look at the pages, more leave too much for the end.
_STEP_BYTES = 32 << 20


class EarlyWriteback:
    """Writes back the host files of a disk's top layer, from the first step of bytes to `__exit__`.

    Where the host gives no thread for it, it does nothing.
    """

    def __init__(self, disk: EngineDisk) -> None:
        self._disk = disk
        self._unseen_bytes = 0
        self._due = threading.Semaphore(0)
        self._ended = False
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._due.release()
        if self._thread is not None:
            self._thread.join()

    def wrote(self, length: int) -> None:
        """So many bytes more were given to the host."""
        self._unseen_bytes += length
        if self._unseen_bytes >= _STEP_BYTES:
            self._unseen_bytes = 0
            if self._thread is None:
                self._start()
            self._due.release()

    def _start(self) -> None:
        thread = threading.Thread(target=self._serve, name="tapfs writeback", daemon=True)
        with suppress(RuntimeError, MemoryError):
            thread.start()
            self._thread = thread

    def _serve(self) -> None:
        while not self._ended:
            self._due.acquire()
            while self._due.acquire(blocking=False):
                pass  # one call writes back what several steps have left
            if not self._ended:
                self._disk.start_writeback()
