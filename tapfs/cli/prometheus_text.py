"""The text exposition of Prometheus: what `tapfs stats --prometheus` prints of the disks in use.

Each family is described once, with HELP and TYPE, and its samples follow each other. Latencies are histograms: the
buckets count what took so long or less, by kind of request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tapfs.errors import printable

if TYPE_CHECKING:
    from tapfs.cli.measuring import Measured

_SECOND_NS = 1_000_000_000

#: Values of a disk: name, type, help, and how it is found (None: not known).
_OF_DISKS: Sequence[tuple[str, str, str, Callable[[Measured], float | None]]] = (
    ("tapfs_up", "gauge", "Whether the process that serves the disk answers.", lambda disk: int(disk.up)),
    ("tapfs_paused", "gauge", "Whether the disk is paused.", lambda disk: int(disk.paused)),
    ("tapfs_clients", "gauge", "Clients that are connected.", lambda disk: disk.clients),
    ("tapfs_disk_size_bytes", "gauge", "Bytes of the disk.", lambda disk: disk.size),
)

#: Counters of the engine and of the doors: name in the statistics, name of the family, type, help.
_STATISTICS: Sequence[tuple[str, str, str, str]] = (
    ("bytes_read", "tapfs_image_read_bytes_total", "counter", "Bytes read from the image."),
    ("bytes_written", "tapfs_image_written_bytes_total", "counter", "Bytes written to the image."),
    ("cache_hits", "tapfs_map_cache_hits_total", "counter", "Lookups that the map cache answered."),
    ("cache_misses", "tapfs_map_cache_misses_total", "counter", "Lookups that the map cache could not answer."),
    ("cache_fills", "tapfs_map_cache_fills_total", "counter", "Map units that were read into the map cache."),
    ("cache_bytes", "tapfs_map_cache_bytes", "gauge", "Bytes that the map cache holds."),
    ("parked", "tapfs_requests_parked_total", "counter", "Requests that waited for metadata."),
    ("waited", "tapfs_requests_waited_total", "counter", "Reads and writes that waited for the host."),
    ("merged", "tapfs_requests_merged_total", "counter", "Requests that were moved with the one before."),
    ("in_flight", "tapfs_requests_in_flight", "gauge", "Requests taken and not answered."),
    ("held", "tapfs_held_bytes", "gauge", "Bytes of requests and replies in memory."),
)


def exposition(disks: Sequence[Measured], version: str) -> str:
    """The whole text, with a line feed at its end."""
    return "".join(f"{line}\n" for line in _lines(disks, version))


def _lines(disks: Sequence[Measured], version: str) -> Iterator[str]:
    yield from _family("tapfs_build_info", "gauge", "The version of the program that has asked.")
    yield f'tapfs_build_info{{version="{_escaped(version)}"}} 1'
    for name, kind, told, value in _OF_DISKS:
        yield from _samples(name, kind, told, [(_labels(disk), value(disk)) for disk in disks])
    for key, name, kind, told in _STATISTICS:
        found = [(_labels(disk), (disk.statistics or {}).get(key)) for disk in disks]
        yield from _samples(name, kind, told, found)
    throttled = [(_labels(disk), (disk.statistics or {}).get("throttled_ns")) for disk in disks]
    in_seconds = [(labels, None if value is None else value / _SECOND_NS) for labels, value in throttled]
    yield from _samples(
        "tapfs_throttled_seconds_total", "counter", "Seconds that requests waited for the rate limit.", in_seconds
    )
    yield from _by_kind(disks)


def _by_kind(disks: Sequence[Measured]) -> Iterator[str]:
    """What is counted for each kind of request."""
    found = [
        (_labels(disk, operation=kind), metric, disk.operations["bounds_ns"])
        for disk in disks
        if disk.operations is not None
        for kind, metric in disk.operations["operations"].items()
    ]
    for name, key, told in (
        ("tapfs_requests_total", "requests", "Requests that were answered."),
        ("tapfs_request_errors_total", "errors", "Requests that were answered with an error."),
        ("tapfs_request_bytes_total", "bytes", "Bytes of reads and writes that succeeded."),
    ):
        yield from _samples(name, "counter", told, [(labels, metric[key]) for labels, metric, _ in found])
    if found:
        yield from _family("tapfs_request_duration_seconds", "histogram", "From taking a request to its answer.")
    for labels, metric, bounds in found:
        yield from _histogram(labels, metric, bounds)


def _histogram(labels: str, metric: Mapping[str, Any], bounds: Sequence[int]) -> Iterator[str]:
    counts: Sequence[int] = metric["buckets"]
    name, below = "tapfs_request_duration_seconds", 0
    for count, bound in zip(counts, [*(str(each / _SECOND_NS) for each in bounds), "+Inf"], strict=True):
        below += count
        yield f'{name}_bucket{{{labels},le="{bound}"}} {below}'
    yield f"{name}_sum{{{labels}}} {metric['nanoseconds'] / _SECOND_NS}"
    yield f"{name}_count{{{labels}}} {below}"


def _samples(name: str, kind: str, told: str, found: Sequence[tuple[str, float | None]]) -> Iterator[str]:
    """A family with those of its samples that have a value; nothing if none has."""
    known = [(labels, value) for labels, value in found if value is not None]
    if known:
        yield from _family(name, kind, told)
    for labels, value in known:
        yield f"{name}{{{labels}}} {value}"


def _family(name: str, kind: str, told: str) -> Iterator[str]:
    yield f"# HELP {name} {told}"
    yield f"# TYPE {name} {kind}"


def _labels(disk: Measured, **further: str) -> str:
    labels = {"door": disk.door, "disk": disk.disk, "image": disk.image, "format": disk.format, **further}
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())


def _escaped(text: str) -> str:
    """As a label may hold it, whatever bytes the name of a file has."""
    return printable(text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
