"""The options with which files that lie elsewhere are read."""

from __future__ import annotations

from tapfs.records import dataclass

#: The least bound of a local copy: two readers of one with less would take blocks from each other without an end.
LEAST_COPY_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class RemoteOptions:
    """How files elsewhere are read: `copy_bytes` bounds the local copy of each, `timeout_seconds` one request.

    `kept_in` is a folder in which copies are kept between runs, None: they are not. A request that fails by the network
    is tried `tries` times, after a pause that doubles from `pause_seconds`.
    """

    copy_bytes: int = 8 << 30
    timeout_seconds: float = 60
    tries: int = 6
    pause_seconds: float = 0.2
    kept_in: str | None = None


#: The options where nobody gives others.
USUAL = RemoteOptions()
