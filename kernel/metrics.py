"""Metrics of a front end, as Python sees them: counters and a histogram of latencies for each kind of request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from tapfs.kernel._engine import ffi, lib

if TYPE_CHECKING:
    from tapfs.kernel._engine import CData

#: The kinds of requests, in the order of serving/metrics.h.
KINDS = ("read", "write", "flush", "zero", "discard", "other")

#: The bounds of the buckets, in nanoseconds: a bucket counts what is below its bound and in none before it. The last
#: bucket has no bound.
BOUNDS_NS = tuple(1 << (lib.TAPFS_METRIC_FIRST_BITS + bucket) for bucket in range(lib.TAPFS_METRIC_BUCKETS - 1))


class Metric(NamedTuple):
    """The requests of a kind that were answered: with an error, bytes of successful reads or writes, sum of latencies.

    `buckets`: how many took how long (`BOUNDS_NS`).
    """

    errors: int
    bytes: int
    nanoseconds: int
    buckets: tuple[int, ...]

    @property
    def requests(self) -> int:
        """How many were answered."""
        return sum(self.buckets)

    def plus(self, other: Metric) -> Metric:
        """Both together."""
        return Metric(
            self.errors + other.errors,
            self.bytes + other.bytes,
            self.nanoseconds + other.nanoseconds,
            tuple(map(sum, zip(self.buckets, other.buckets, strict=True))),
        )


#: By kind.
Metrics = Mapping[str, Metric]

NONE: Metrics = {kind: Metric(0, 0, 0, (0,) * lib.TAPFS_METRIC_BUCKETS) for kind in KINDS}


def read_metrics(metrics: CData) -> Metrics:
    """What a front end of the engine has counted so far."""
    found = ffi.new("tapfs_metric *")
    read: dict[str, Metric] = {}
    for number, kind in enumerate(KINDS):
        lib.tapfs_metrics_read(metrics, number, found)
        read[kind] = Metric(found.errors, found.bytes, found.nanoseconds, tuple(found.buckets))
    return read


def together(one: Metrics, other: Metrics) -> Metrics:
    """What two front ends of a disk, one after the other, have counted."""
    return {kind: metric.plus(other[kind]) for kind, metric in one.items()}


def as_data(metrics: Metrics) -> dict[str, object]:
    """The form in which a process tells another of it."""
    operations = {kind: {"requests": metric.requests, **metric._asdict()} for kind, metric in metrics.items()}
    return {"bounds_ns": BOUNDS_NS, "operations": operations}
