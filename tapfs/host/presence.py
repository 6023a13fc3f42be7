"""Presence: which blocks of a host file have come, for a file that is a copy of something elsewhere.

The engine knows descriptors and never calls back. So a file that lies elsewhere is a sparse file of this host, and one
byte for each of its blocks says whether the block is here. A read that meets an absent block ends with FETCH; its
owner has the block fetched, which makes it present, and the read goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock


class Presence:
    """The blocks of one file that is only read. `fetch` writes the bytes of a range of whole blocks into the file.

    `fetch` takes an offset and a length in bytes, which may end with the file; it raises ImageError. Several threads
    may ask for the same block, which is fetched once.
    """

    def __init__(self, block_bytes: int, size: int, fetch: Callable[[int, int], None]) -> None:
        self.block_bytes = block_bytes
        #: One byte a block, which the engine reads: 0 absent, 1 here.
        self.blocks = bytearray(-(-size // block_bytes))
        self._size = size
        self._fetch = fetch
        self._lock = Lock()

    def require(self, offset: int, length: int) -> None:
        """Have every block of the range here, as far as the file goes. Raises what `fetch` raises."""
        first, stop = offset // self.block_bytes, min(-(-(offset + length) // self.block_bytes), len(self.blocks))
        if self.blocks.count(0, first, stop) == 0:
            return
        with self._lock:
            while (block := self.blocks.find(0, first, stop)) >= 0:
                present = self.blocks.find(1, block, stop)
                end = stop if present < 0 else present
                start = block * self.block_bytes
                self._fetch(start, min(end * self.block_bytes, self._size) - start)
                # Only now: the engine reads the file as soon as a block is said to be here.
                self.blocks[block:end] = b"\1" * (end - block)
                first = end
