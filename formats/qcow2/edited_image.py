"""The parts that edits of a qcow2 image share: the image as an edit sees it, new clusters, marks and plans.

An edit is a generator of plans (`tapfs.edit_protocols`). Its metadata goes to new clusters, and one write inside a
sector of the header switches to it. So whatever cuts the edit off, the image reads as before or as wanted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from tapfs.driver import CheckReport, HostFile, ProgressCallback
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.changed_table import SECTOR
from tapfs.formats.qcow2.entries import Decoder
from tapfs.formats.qcow2.extensions import Extension
from tapfs.formats.qcow2.header import AUTOCLEAR_AT, DIRTY, INCOMPATIBLE_AT, WORD, Header
from tapfs.formats.qcow2.l1 import L1Table
from tapfs.formats.qcow2.refcounts import ClusterRun, Refcounts
from tapfs.formats.qcow2.signature import VERSIONS
from tapfs.formats.qcow2.snapshots import Snapshot
from tapfs.formats.qcow2.space import Space
from tapfs.formats.rounding import round_up
from tapfs.plan import Plan, Step, Write, plan

#: Steps of about so many bytes make one plan.
_PLAN_BYTES = 8 << 20


class EditedImage(Protocol):
    """An image open for writing, in which nothing is pending."""

    file: HostFile
    header: Header
    extensions: list[Extension]
    l1: L1Table
    l1_offset: int
    decoder: Decoder
    refcounts: Refcounts
    space: Space

    def reserved(self) -> tuple[tuple[str, int, int], ...]:
        """The name, start and end of each table in which no data can lie."""
        ...

    def read_snapshots(self) -> list[Snapshot]:
        """The snapshot table."""
        ...

    def ensure_counts(self, start: int, length: int) -> None:
        """Have refcount blocks for clusters that were taken."""
        ...

    def check(self, progress: ProgressCallback | None = None) -> CheckReport:
        """Compare all metadata with itself."""
        ...

    def flush(self) -> Plan:
        """The plan that makes changed counts durable."""
        ...

    def flushed(self, executed: Plan) -> None:
        """It is durable."""
        ...


def require_sound(image: EditedImage, op: str) -> None:
    """Raise ImageError(corrupt) if a count or a table cannot be true: an edit would free what is still in use."""
    report = image.check()
    if report.corruptions:
        first = next(each for each in report.findings if each.severity == "corruption")
        raise ImageError(
            ErrorKind.CORRUPT,
            f"its metadata has {report.corruptions} errors, and it stays as it is; the first: {first.message}",
            path=image.file.path,
            offset=first.host_offset,
            op=op,
            remedy="run tapfs repair, or convert what can be read into a new image",
        )


def l1_of(image: EditedImage, snapshot: Snapshot, op: str) -> L1Table:
    """The L1 table of a snapshot. Raises ImageError(corrupt) where it cannot be there."""
    raw = image.file.read(snapshot.l1_offset, snapshot.l1_length) if snapshot.l1_length else b""
    if len(raw) < snapshot.l1_length or snapshot.l1_offset % image.header.cluster_size:
        message = f"the L1 table of snapshot {snapshot.name or snapshot.id} cannot be there"
        raise ImageError(ErrorKind.CORRUPT, message, path=image.file.path, offset=snapshot.offset, op=op)
    return L1Table(bytearray(raw))


def take(image: EditedImage, content: bytes) -> tuple[int, Step]:
    """New clusters in a row for `content`, with their counts raised in memory; the offset, and the step that writes it.

    `durable` brings the counts to the disk, which must be done before anything refers to the clusters.
    """
    size = image.header.cluster_size
    length = round_up(max(1, len(content)), size)
    place = image.space.take_whole(length // size)
    image.ensure_counts(place, length)
    image.refcounts.raise_counts(place // size, length // size)
    return place, Write(0, place, content.ljust(round_up(len(content), SECTOR), b"\0"))


def release(image: EditedImage, start: int, length: int) -> None:
    """Lower the counts of the clusters of a piece of metadata that nothing refers to any more; `durable` does it."""
    if length:
        image.refcounts.lower_counts(*cluster_run(image, start, length))


def cluster_run(image: EditedImage, start: int, length: int) -> ClusterRun:
    """The clusters of a piece of metadata, which begins with the first of them."""
    bits = image.header.cluster_bits
    return ClusterRun(start >> bits, -(-length >> bits))


def durable(image: EditedImage) -> Iterator[Plan]:
    """The plan that brings all counts to the disk that were changed in memory, if there are any."""
    counts = image.flush()
    if counts:
        yield counts
        image.flushed(counts)


def marked(image: EditedImage, *, dirty: bool = False, also: int = 0, without: int = 0) -> Iterator[Plan]:
    """Have the header say before a change what has to be said.

    Bits of autoclear features that are unknown are cleared, as every writer must do. `dirty`: the image is marked as
    being changed; a writer has to repair it if nobody takes the mark away. Version 2 has none of this. `also` and
    `without` are bits of autoclear features to be set and to be cleared.
    """
    header = image.header
    if header.version == VERSIONS[0]:
        return
    autoclear = (header.kept_autoclear | also) & ~without
    incompatible = header.incompatible | DIRTY if dirty else header.incompatible & ~DIRTY
    if (incompatible, autoclear) == (header.incompatible, header.autoclear):
        return
    changed = header._replace(incompatible=incompatible, autoclear=autoclear)
    yield plan([Write(0, INCOMPATIBLE_AT, changed.pack()[INCOMPATIBLE_AT : AUTOCLEAR_AT + WORD])])
    image.header = changed


def in_plans(steps: Iterable[Step]) -> Iterator[Plan]:
    """Writes that need nothing of each other, in plans of bounded size."""
    waiting: list[Step] = []
    length = 0
    for step in steps:
        waiting.append(step)
        length += len(step.data) if isinstance(step, Write) else 0
        if length >= _PLAN_BYTES:
            yield plan(waiting)
            waiting, length = [], 0
    if waiting:
        yield plan(waiting)


def changed_sectors(place: int, old: bytes, new: bytes | bytearray) -> list[Step]:
    """The writes of the sectors in which two contents of the same place differ."""
    if old == new:
        return []
    steps: list[Step] = []
    at, end = 0, len(new)
    while at < end:
        stop = at
        while stop < end and old[stop : stop + SECTOR] != new[stop : stop + SECTOR]:
            stop += SECTOR
        if stop > at:
            steps.append(Write(0, place + at, bytes(new[at:stop])))
        at = stop + SECTOR
    return steps


def refused(image: EditedImage, message: str, op: str, remedy: str | None = None) -> ImageError:
    """The error of an edit that the image cannot have."""
    return ImageError(ErrorKind.UNSUPPORTED, message, path=image.file.path, op=op, remedy=remedy)
