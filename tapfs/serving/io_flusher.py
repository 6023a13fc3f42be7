"""Tell Linux that this process takes part in writing out dirty pages of others (PR_SET_IO_FLUSHER).

Writeback of the host may pass through a disk that this process serves. If memory that this process asks for waited for
that writeback, each would wait for the other for ever. With the flag the kernel gives such memory without writeback and
does not throttle the process's own writes (prctl(2), Linux 5.6).
"""

from __future__ import annotations

import ctypes

_PR_SET_IO_FLUSHER = 57


def become_io_flusher() -> bool:
    """Set the flag for the calling thread, and so for threads and processes that it starts later; whether it is set.

    It needs CAP_SYS_RESOURCE. Where that is missing nothing changes.
    """
    result: int = ctypes.CDLL(None).prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0)
    return result == 0
