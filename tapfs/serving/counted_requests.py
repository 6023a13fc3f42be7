"""Counts of the requests that Python answers itself, of the form in which the engine counts those of its front ends."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from tapfs.kernel.metrics import BOUNDS_NS, KINDS, Metric, Metrics

#: The exponent of the first bound: a bucket begins at a power of two.
_FIRST_BITS = BOUNDS_NS[0].bit_length() - 1


class _Kind:
    """The requests of one kind."""

    def __init__(self) -> None:
        self.errors = self.bytes = self.nanoseconds = 0
        self.buckets = [0] * (len(BOUNDS_NS) + 1)


class CountedRequest:
    """A request that is being answered: a context, in which `bytes` is set before it ends."""

    def __init__(self, kind: _Kind) -> None:
        self.bytes = 0
        self._kind = kind
        self._begun = 0

    def __enter__(self) -> Self:
        self._begun = time.perf_counter_ns()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        took = time.perf_counter_ns() - self._begun
        counted = self._kind
        counted.nanoseconds += took
        counted.buckets[min((took >> _FIRST_BITS).bit_length(), len(BOUNDS_NS))] += 1
        if kind is None:
            counted.bytes += self.bytes
        else:
            counted.errors += 1


class CountedRequests:
    """What one front end has answered so far. Its requests begin and end in one thread."""

    def __init__(self) -> None:
        self._kinds = {kind: _Kind() for kind in KINDS}

    def request(self, kind: str) -> CountedRequest:
        """A request of a kind of `tapfs.kernel.metrics.KINDS`."""
        return CountedRequest(self._kinds[kind])

    def metrics(self) -> Metrics:
        """The counts now."""
        return {
            name: Metric(kind.errors, kind.bytes, kind.nanoseconds, tuple(kind.buckets))
            for name, kind in self._kinds.items()
        }
