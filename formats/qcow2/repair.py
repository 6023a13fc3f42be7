"""Repair a qcow2 image without touching guest data.

The plans, each of which a crash may cut off anywhere. Before them the bits of unknown autoclear features are cleared,
as before every change.

1. The bit of a raw data file is cleared where there is none.
2. Refcounts that are too low are raised, where a table or block of them is unusable all of them are counted anew at the
   end of the file. One write of the header's fields then leads to the new ones.
3. Bits that are reserved are cleared, and so are places of zeros that cannot be: the disk reads the same.
4. Entries of the disk that name one table or one cluster get copies of their own, up to a bound.
5. Refcounts that are too high are lowered: what had leaked is free.
6. The bits that say "owned alone" follow the refcounts.
7. The image is not marked as dirty any more, and not as corrupt if nothing is wrong with it then.

Before all of them bitmaps that cannot be true are dropped, if the user gives them up (dropped_bitmaps.py).

Entries that lead nowhere stay as they are, because nobody knows what the guest had there. Where a table cannot be read
no other table is changed, and nothing is freed: what looks like a table may be data of the one that is lost.
"""

from __future__ import annotations

from functools import partial

from tapfs.driver import OpenRequest, Severity
from tapfs.errors import ImageError
from tapfs.formats.qcow2.check import Check, Mismatch
from tapfs.formats.qcow2.doubled import copied_clusters, copied_tables, doubled_entries, doubled_tables
from tapfs.formats.qcow2.dropped_bitmaps import dropped_bitmaps
from tapfs.formats.qcow2.entries import COPIED
from tapfs.formats.qcow2.header import (
    AUTOCLEAR_AT,
    CORRUPT,
    DIRTY,
    INCOMPATIBLE_AT,
    SNAPSHOT_COUNT_AT,
    WORD,
)
from tapfs.formats.qcow2.planned import PlannedFile
from tapfs.formats.qcow2.reader import Qcow2Reader
from tapfs.formats.qcow2.refcounts import Refcounts
from tapfs.formats.qcow2.references import References
from tapfs.formats.qcow2.signature import VERSIONS
from tapfs.formats.qcow2.snapshots import pack_snapshots
from tapfs.formats.rounding import round_down, round_up
from tapfs.plan import Grow, Plan, Step, Write, plan

#: So often the refcounts are looked at again after a correction.
_ROUNDS = 3


def repair_plans(image: Qcow2Reader, *, drop_bitmaps: bool = False) -> list[Plan]:
    """The plans for an image, to be executed one after the other; empty if all is well.

    `drop_bitmaps`: bitmaps that cannot be true are given up.
    """
    first = Check(image)
    if image.open_findings or first.references.tangled:  # what leads to everything else is damaged
        return []
    plans = _without_raw_bit(image)
    plans += _dropped(_seen(image, plans), first.references) if drop_bitmaps else []
    first = Check(_seen(image, plans)) if plans else first
    if first.references.broken_refcounts and not first.references.incomplete:
        plans.append(_rebuilt(_seen(image, plans), first.references))
    plans += _sized_snapshots(_seen(image, plans)) if plans or not first.references.broken_refcounts else []
    plans += _mended(_seen(image, plans))
    # What lies past the end of the file may lie in it once new refcounts are at the end: it is counted then.
    for _ in range(_ROUNDS):
        before = len(plans)
        plans += _apart(image, plans)
        plans += _correct(_seen(image, plans))
        if len(plans) == before:
            break
    bits = _bits(_seen(image, plans))
    if bits:
        plans.append(bits)
    marks = _marks(image, _seen(image, plans))
    plans += [marks] if marks else []
    if not plans or image.header.kept_autoclear == image.header.autoclear:
        return plans
    return [_autoclear(image), *plans]


def _without_raw_bit(image: Qcow2Reader) -> list[Plan]:
    """The plan for an image that says that its data file is raw, and has none: QEMU does not open it."""
    if not image.header.lacks_raw_data_file:
        return []
    return [_autoclear(image, "the bit of a raw data file, in an image without one")]


def _autoclear(image: Qcow2Reader, mends: str = "") -> Plan:
    """Clear the autoclear features that no writer keeps."""
    return plan([Write(0, AUTOCLEAR_AT, image.header.kept_autoclear.to_bytes(WORD, "big"))], mends=mends)


def _sized_snapshots(image: Qcow2Reader) -> list[Plan]:
    """A new snapshot table whose entries all say their sizes, where version 3 requires them; the old one has leaked."""
    try:
        listed = image.read_snapshots()
        table = pack_snapshots(listed, image.file.path)
    except ImageError:
        return []
    check = References(image, _ignored)
    if image.header.version == VERSIONS[0] or all(each.has_sizes for each in listed) or check.broken_refcounts:
        return []
    counts, place = _counted(image, check, len(table))
    fields = len(listed).to_bytes(4, "big") + place.to_bytes(WORD, "big")
    content, switch = Write(0, place, table), Write(0, SNAPSHOT_COUNT_AT, fields)
    return [counts, plan([content], [switch], mends="a table of snapshots that did not say their sizes")]


def _counted(image: Qcow2Reader, references: References, length: int) -> tuple[Plan, int]:
    """The plan that counts new clusters at the end for so many bytes, and their place."""
    size = image.header.cluster_size
    refcounts = Refcounts(image.file, image.header)
    end = _End(image, references, refcounts.counted_end())
    clusters = -(-length // size)
    place = end.take(clusters)
    refcounts.ensure(place // size, clusters, end.take)
    refcounts.raise_counts(place // size, clusters)
    return _refcount_plan(refcounts, end.end, ""), place


def _dropped(image: Qcow2Reader, references: References) -> list[Plan]:
    """Plans that drop bitmaps, made on a reader of their own: they note what they change in its header."""
    own = _seen(image, [])
    counted = None if references.broken_refcounts else partial(_counted, own, references)
    return list(dropped_bitmaps(own, counted))


def _correct(image: Qcow2Reader) -> list[Plan]:
    """Plans for the refcounts: first those that are too low, then those that are too high.

    While a snapshot or a bitmap cannot be looked at nothing is taken for free: its clusters would be lost.
    """
    check = Check(image)
    incomplete = check.references.incomplete
    if check.references.broken_refcounts:
        return [] if incomplete else [_rebuilt(image, check.references)]
    wrong = list(check.mismatches())
    low = [each for each in wrong if each.refcount < min(each.references, check.largest)]
    high = [each for each in wrong if each.refcount > each.references]
    plans: list[Plan] = []
    if low:
        count = sum(each.clusters for each in low)
        plans.append(_corrected(image, low, f"{_clusters(count)} with refcounts that were too low"))
    if high and not incomplete:
        leaked = sum(each.clusters for each in high) * image.header.cluster_size
        plans.append(_corrected(_seen(image, plans), high, f"leaked space of {leaked} bytes"))
    return plans


def _apart(image: Qcow2Reader, before: list[Plan]) -> list[Plan]:
    """Plans that give each table and each entry of the disk what it alone has: see `tapfs.formats.qcow2.doubled`."""
    plans: list[Plan] = []
    for find, copy, what in (
        (doubled_tables, copied_tables, "an L2 table"),
        (doubled_entries, copied_clusters, "a cluster"),
    ):
        seen = _seen(image, before + plans)
        references = Check(seen).references
        # Unusable refcounts are counted anew first. Where a table cannot be read, what looks like one may be its data.
        found = [] if references.broken_refcounts or references.incomplete else find(seen, references)
        if not found:
            continue
        refcounts = Refcounts(seen.file, seen.header)
        end = _End(seen, references, refcounts.counted_end())
        start = end.end >> seen.header.cluster_bits
        copied = copy(seen, found, end.take)
        refcounts.ensure(start, len(found), end.take)
        for at, (_, _, times) in enumerate(found):
            refcounts.set_count(start + at, min(times, refcounts.counting.largest))
        counts = _refcount_plan(refcounts, end.end, "")
        mends = f"{_entries(len(found))} of the disk that named {what} which is another one's, by copies"
        plans.append(plan(*counts.stages, copied.copies, copied.entries, mends=mends))
    return plans


def _seen(image: Qcow2Reader, plans: list[Plan]) -> Qcow2Reader:
    """The image as these plans would leave it."""
    return Qcow2Reader(PlannedFile(image.file, plans), OpenRequest(lenient=True, further=image.further))


class _End:
    """New clusters at the end of the file, behind all that is referred to or has a count."""

    def __init__(self, image: Qcow2Reader, references: References, counted_end: int) -> None:
        self._bits = image.header.cluster_bits
        last = max((each.first + each.clusters for each in references.walk()), default=0)
        beyond = max(image.file.size(), references.dangling_end)
        self.end = max(round_up(beyond, 1 << self._bits), max(last, counted_end) << self._bits)

    def take(self, clusters: int) -> int:
        """The offset of so many clusters in a row."""
        place = self.end
        self.end += clusters << self._bits
        return place


def _mended(image: Qcow2Reader) -> list[Plan]:
    """A plan that clears what is reserved, and places of zeros that cannot be: the disk reads the same without."""
    references = Check(image).references
    if references.broken_refcounts or references.incomplete:
        return []  # what looks like a table may be something else's
    mendable = {
        place: word
        for place, word in sorted(references.mendable.items())
        if round_down(place, image.header.cluster_size) not in references.doubled_tables
    }
    steps: list[Step] = [Write(0, place, word.to_bytes(WORD, "big")) for place, word in mendable.items()]
    return [plan(steps, mends=f"{_entries(len(steps))} with bits or places that meant nothing")] if steps else []


def _corrected(image: Qcow2Reader, wrong: list[Mismatch], mends: str) -> Plan:
    """Set the refcounts of clusters to the number of references."""
    refcounts = Refcounts(image.file, image.header)
    end = _End(image, References(image, _ignored), refcounts.counted_end())
    start = end.end
    for each in wrong:
        refcounts.ensure(each.first, each.clusters, end.take)
        for cluster in range(each.first, each.first + each.clusters):
            refcounts.set_count(cluster, each.references)
    return _refcount_plan(refcounts, end.end if end.end > start else 0, mends)


def _rebuilt(image: Qcow2Reader, references: References) -> Plan:
    """Count everything anew, in blocks and a table at the end of the file."""
    end = _End(image, references, 0)
    refcounts = Refcounts(image.file, image.header._replace(reftable_offset=0, reftable_clusters=0))
    for each in references.walk():
        if each.refcounts:
            continue
        refcounts.ensure(each.first, each.clusters, end.take)
        for cluster in range(each.first, each.first + each.clusters):
            refcounts.set_count(cluster, refcounts.get(cluster) + each.times)
    return _refcount_plan(refcounts, end.end, "unusable refcounts, which were counted anew")


def _refcount_plan(refcounts: Refcounts, end: int, mends: str) -> Plan:
    refcounts.begin_plan()
    grow: list[Step] = [Grow(0, end)] if end else []
    # A table that has moved leaves its old place to the same plan.
    return plan(grow, refcounts.raise_steps(), refcounts.table_steps(), refcounts.lower_steps(), mends=mends)


def _bits(image: Qcow2Reader) -> Plan:
    steps: list[Step] = []
    check = Check(image)
    for _, offset in () if check.references.incomplete else check.wrong_bits():
        if round_down(offset, image.header.cluster_size) in check.references.doubled_tables:
            continue  # something else would change, too
        word = int.from_bytes(image.file.read(offset, WORD), "big") ^ COPIED
        steps.append(Write(0, offset, word.to_bytes(WORD, "big")))
    mends = f"{_entries(len(steps))} whose bit of sole ownership was wrong"
    return plan(steps, mends=mends) if steps else Plan()


def _marks(image: Qcow2Reader, mended: Qcow2Reader) -> Plan:
    bits = image.header.incompatible
    wanted = bits if References(mended, _ignored).incomplete else bits & ~DIRTY
    if bits & CORRUPT and not any(each.severity is Severity.CORRUPTION for each in Check(mended).report.findings):
        wanted &= ~CORRUPT
    if wanted == bits:
        return Plan()
    what = [name for bit, name in ((DIRTY, "not closed"), (CORRUPT, "corrupt")) if (bits ^ wanted) & bit]
    return plan([Write(0, INCOMPATIBLE_AT, wanted.to_bytes(WORD, "big"))], mends=f"the mark {' and '.join(what)}")


def _clusters(count: int) -> str:
    return "1 cluster" if count == 1 else f"{count} clusters"


def _entries(count: int) -> str:
    return "1 entry" if count == 1 else f"{count} entries"


def _ignored(message: str, offset: int | None) -> None:
    """Faults were told of by the check."""
