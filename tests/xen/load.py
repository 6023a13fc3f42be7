"""A guest that writes and reads back without end, and remembers what it wrote."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

import trio

from tests.xen.blkif import SECTOR
from tests.xen.frontend import Frontend

#: One write: eight sectors that say where and when.
BLOCK = 8 * SECTOR


class Load:
    """Writes and reads of a disk of `size` bytes in a thread, until the end of the context.

    Any error, and any block that does not read as it was written, is raised there.
    """

    def __init__(self, frontend: Frontend, size: int) -> None:
        self._frontend = frontend
        self._blocks = size // BLOCK
        self._written: dict[int, int] = {}
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        #: Writes that the backend has answered.
        self.count = 0

    @property
    def failed(self) -> bool:
        return self._error is not None

    def check(self) -> None:
        """Raise the error that has ended it, if one has."""
        if self._error is not None:
            raise self._error

    def expected(self) -> bytes:
        """What the disk holds."""
        return b"".join(self._content(block) for block in range(self._blocks))

    def _content(self, block: int) -> bytes:
        return b"%08d.%07d" % (block, self._written[block]) * (BLOCK // 16) if block in self._written else bytes(BLOCK)

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                block = self.count * 7 % self._blocks
                self._written[block] = self.count
                self._frontend.write(block * 8, self._content(block))
                look = self.count * 3 % self._blocks
                if self._frontend.read(look * 8, 8) != self._content(look):
                    raise AssertionError(f"block {look} is not what was written")
                self.count += 1
        except BaseException as error:  # noqa: BLE001  raised by the thread that started us
            self._error = error

    async def __aenter__(self) -> Self:
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._thread.join)  # what it waits for may be served by this thread
        if error is None:
            self.check()
