"""Sources: what a place elsewhere can do, whatever its protocol. Only the process that fetches has one."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from tapfs.errors import ErrorKind, ImageError
from tapfs.host.remote.address import NBD_SCHEMES, OBJECT_SCHEMES, Address
from tapfs.host.remote.options import RemoteOptions
from tapfs.host.remote.retries import retried
from tapfs.records import NamedTuple, replace

#: A source is tried to be opened at most so many times.
_OPENING_TRIES = 3

#: Lengths of files are below this (`loff_t`).
_SIZES_END = 1 << 63


class Facts(NamedTuple):
    """What a source says of itself. `identity` changes with the bytes; None: the source has nothing of the kind.

    `size` in bytes, `modified` in seconds since 1970 (0: it does not say), `writable`: whether it takes writes.
    """

    size: int
    identity: str | None
    modified: int
    writable: bool


class Source(Protocol):
    """A place elsewhere that is open. Several threads may use it at once.

    An ImageError(io) that it raises may be gone at the next try; one of another kind will not be.
    """

    @property
    def facts(self) -> Facts:
        """What it said when it was opened."""
        ...

    def read(self, offset: int, length: int) -> memoryview:
        """Exactly so many bytes, of the same object as when it was opened. Raises ImageError."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


@runtime_checkable
class Mapped(Protocol):
    """A source that may know which of its ranges read as zeros."""

    def data_ranges(self, offset: int, length: int) -> tuple[list[tuple[int, int]], int]:
        """The ranges that may hold other than zeros, ascending and disjoint, and the offset up to which they are all.

        That is behind `offset`, and at most at the end of the range. Raises ImageError.
        """
        ...


class WritableSource(Source, Protocol):
    """A source that takes writes."""

    def write(self, offset: int, data: bytes) -> None:
        """Write all of the data, which has got there when it returns. Raises ImageError."""
        ...

    def flush(self) -> None:
        """Have every write that has returned be durable. Raises ImageError, also for writes that may be lost."""
        ...


def refuse_writing(address: Address) -> None:
    """Raise ImageError(read_only) for an address that takes no writes, whatever lies there."""
    if address.scheme in OBJECT_SCHEMES:
        raise ImageError(
            ErrorKind.READ_ONLY,
            f"tapfs does not write to {address.scheme} addresses",
            path=str(address),
            op="open",
            remedy="write to an overlay: {overlay=FILE} or {temp}",
        )


def open_writable(address: Address, options: RemoteOptions) -> WritableSource:
    """Open what lies at an address for writing. Raises ImageError(read_only) where it takes no writes."""
    source = retried(lambda: _served(address, options, writable=True), _opening(options))
    _require_length(source, address)
    if not source.facts.writable:
        source.close()
        raise ImageError(ErrorKind.READ_ONLY, "what is there may only be read", path=str(address), op="open")
    return source


def open_source(address: Address, options: RemoteOptions) -> Source:
    """Open what lies at an address. Raises ImageError."""
    source = retried(lambda: _opened(address, options), _opening(options))
    _require_length(source, address)
    return source


def has_changed(name: str, how: str = "") -> ImageError:
    """The error of a source that is not the object any more that was opened; `how`: how that shows."""
    message = f"has changed since it was opened{how and ': '}{how}"
    return ImageError(ErrorKind.CORRUPT, message, path=name, op="read", remedy="open it again")


def _require_length(source: Source, address: Address) -> None:
    """Close a source and raise ImageError(corrupt) if no file can be as long as it says that it is."""
    if not 0 <= source.facts.size < _SIZES_END:
        source.close()
        message = f"says that it has {source.facts.size} bytes, and no file has as many"
        raise ImageError(ErrorKind.CORRUPT, message, path=str(address), op="open")


def _opening(options: RemoteOptions) -> RemoteOptions:
    """Who has mistaken an address wants to know it soon."""
    return replace(options, tries=min(options.tries, _OPENING_TRIES))


def _opened(address: Address, options: RemoteOptions) -> Source:
    if address.scheme in OBJECT_SCHEMES:
        from tapfs.host.remote.objects import ObjectSource  # only those who need it load the library

        return ObjectSource(address, timeout_seconds=options.timeout_seconds)
    return _served(address, options, writable=False)


def _served(address: Address, options: RemoteOptions, *, writable: bool) -> WritableSource:
    if address.scheme in NBD_SCHEMES:
        from tapfs.host.remote.nbd import NbdSource

        return NbdSource(address, timeout_seconds=options.timeout_seconds)
    from tapfs.host.remote.rbd import RbdSource

    return RbdSource(address, timeout_seconds=options.timeout_seconds, writable=writable)
