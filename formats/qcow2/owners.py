"""Refuse to write a qcow2 image in which several entries refer to one cluster and its refcount does not say so.

A cluster whose entry says that it is owned alone is written in place, and the write would change what another entry
shows. A cluster with a refcount below its references is free too early: its place is given away, or is made a hole.

All L2 tables are read for that, whatever the image's size. A bit for each cluster says that an entry owns the cluster.
References that own nothing (of compressed clusters, and of what snapshots share) are counted, where there are any.
A refcount that is too high is a leak, such as a crash leaves, and keeps nobody from writing.

Clusters of a data file have no refcounts. An entry of such an image is true only where it names its own place of the
disk (`tapfs.formats.qcow2.reader`), so no two name one place.
"""

from __future__ import annotations

from collections.abc import Iterator

from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.apart import REMEDY
from tapfs.formats.qcow2.entries import COPIED, OFFSET
from tapfs.formats.qcow2.header import WORD
from tapfs.formats.qcow2.reader import Qcow2Reader
from tapfs.formats.qcow2.refcounts import Refcounts
from tapfs.formats.qcow2.references import References
from tapfs.formats.qcow2.tally import Tally
from tapfs.references import CountedWindow, OwnedClusters, count_changer

#: The clusters of a window of bits, as a power of two: two times 16 MiB, of which those that are set take memory.
OWNED_BITS = 27

#: Counts and refcounts of one byte are compared by one subtraction of long numbers while they are below this.
_LOW = 0x7F
_AT_MOST_LOW = bytes(min(number, _LOW) for number in range(256))
_BELOW_LOW = bytes(range(_LOW))
_BYTE = 8


def require_owners(image: Qcow2Reader, refcounts: Refcounts) -> None:
    """Raise ImageError(corrupt) if a cluster of data or an L2 table has more references than its refcount says.

    So it does if an entry says that it owns alone what another one refers to, too. The offset is that of the cluster or
    of the entry.
    """
    if image.header.has_data_file:
        return
    references = References(image, _ignored)
    if references.doubled_tables:  # a change of an entry would change what else is there
        place = min(references.doubled_tables)
        raise _refused(image, f"the L2 table at {place:#x} lies over other metadata", place, REMEDY)
    if not references.tables:
        return
    _require_tables(image, refcounts, references)
    tally = Tally(image, references)
    shared = False
    for owners in _windows(tally):
        _require_counted(image, refcounts, owners)
        shared |= owners.shared > 0
    waiting, done = {0} if shared else set[int](), set[int]()
    while waiting:
        number = waiting.pop()
        done.add(number)
        window = tally.shared_entries(number)
        waiting |= window.others - done
        _require_counts(image, refcounts, window)


def _windows(tally: Tally) -> Iterator[OwnedClusters]:
    """The clusters that entries refer to, window by window; an error for an entry that shares what one owns."""
    waiting, done = {0}, set[int]()
    while waiting:
        number = waiting.pop()
        done.add(number)
        owners = OwnedClusters(number, OWNED_BITS, tally.file_clusters)
        doubled = tally.mark_owners(owners)
        if doubled is not None:
            raise _shared(tally.image, *doubled)
        waiting |= owners.others - done
        yield owners


def _shared(image: Qcow2Reader, entry: int, place: int) -> ImageError:
    word = int.from_bytes(image.file.read(place, WORD), "big")
    wrong = _alone(word) if word & COPIED else f"{word:#x} refers to a cluster that another entry says it owns alone"
    # A repair copies no cluster that is encrypted by its place, and a count of one bit cannot say that there are two.
    remedy = REMEDY if image.header.refcount_order == 0 and image.encryption is not None else None
    return _refused(image, f"L2 entry {entry}: {wrong}", place, remedy)


def _require_tables(image: Qcow2Reader, refcounts: Refcounts, references: References) -> None:
    shared = {use.place: use.times for use in references.tables if use.times > 1}
    for place, times in shared.items():
        number = _refcount(refcounts, place >> image.header.cluster_bits)
        if number is not None and number < times:
            raise _too_low(image, refcounts, "L2 table", place, number, times)
    for index, entry in image.l1.used() if shared else ():
        if entry & COPIED and entry & OFFSET in shared:
            raise _refused(image, f"L1 entry {index}: {_alone(entry)}", image.l1_offset + WORD * index)


def _require_counted(image: Qcow2Reader, refcounts: Refcounts, owners: OwnedClusters) -> None:
    """Raise if an entry owns a cluster whose refcount is 0."""
    bits, per_block = image.header.cluster_bits, refcounts.per_block
    for low in range(0, owners.clusters, per_block):
        high = min(low + per_block, owners.clusters)
        if not any(owners.alone[low // _BYTE : -(-high // _BYTE)]):
            continue
        raw = _block(image, refcounts, (owners.base + low) // per_block)
        if raw is None:
            continue
        first = (owners.base + low) % per_block
        at = _uncounted(refcounts, raw, first, high - low, owners.alone, low)
        if at < high - low:
            raise _too_low(image, refcounts, "cluster", (owners.base + low + at) << bits, 0, 1)


def _uncounted(refcounts: Refcounts, raw: bytes, first: int, count: int, marks: bytearray, mark: int) -> int:
    """See `tapfs.references.CountChanger.find_uncounted`."""
    changer = count_changer()
    if changer is not None:
        return changer.find_uncounted(raw, refcounts.counting.order, first, count, marks, mark)
    used = refcounts.counting.used(raw)[first : first + count]
    at = used.find(0)
    while at >= 0:
        if marks[mark + at >> 3] >> (mark + at & 7) & 1:
            return at
        at = used.find(0, at + 1)
    return count


def _require_counts(image: Qcow2Reader, refcounts: Refcounts, window: CountedWindow) -> None:
    """Compare references with refcounts, one block of these after the other."""
    counting, per_block = refcounts.counting, refcounts.per_block
    stop = window.base + window.clusters
    for index in range(window.base // per_block, -(-stop // per_block)):
        start = index * per_block
        low, high = max(start, window.base), min(start + per_block, stop)
        wanted = window.references(low, high)
        if wanted.count(0) == high - low:
            continue
        raw = _block(image, refcounts, index)
        if raw is None:
            continue
        if window.width == 1 and _reach(counting.capped(raw)[low - start : high - start], wanted.tobytes()):
            continue
        for at, (number, count) in enumerate(zip(counting.numbers(raw)[low - start :], wanted, strict=False)):
            if number < count:
                place = (low + at) << image.header.cluster_bits
                raise _too_low(image, refcounts, "cluster", place, number, count)


def _block(image: Qcow2Reader, refcounts: Refcounts, index: int) -> bytes | None:
    """A block of refcounts, zeros where there is none; None for a damaged one, which whoever changes it refuses."""
    try:
        block = refcounts.block(index)
    except ImageError:
        return None
    return bytes(image.header.cluster_size) if block is None else block.tobytes()


def _reach(numbers: bytes, counts: bytes) -> bool:
    """Whether each number is known to be no smaller than its count."""
    if numbers == counts:
        return True
    if counts.translate(None, _BELOW_LOW):
        return False
    top = int.from_bytes(b"\x80" * len(counts), "big")
    return (int.from_bytes(numbers.translate(_AT_MOST_LOW), "big") | top) - int.from_bytes(counts, "big") & top == top


def _refcount(refcounts: Refcounts, cluster: int) -> int | None:
    try:
        return refcounts.get(cluster)
    except ImageError:  # whoever has to change a damaged block refuses to
        return None


def _alone(entry: int) -> str:
    return f"{entry:#x} says that the cluster is owned alone, and another entry refers to it"


def _too_low(
    image: Qcow2Reader, refcounts: Refcounts, what: str, place: int, number: int, references: int
) -> ImageError:
    message = f"{what} at {place:#x} has refcount {number} and {references} references"
    # A repair cannot say so much in narrow refcounts.
    remedy = REMEDY if references > refcounts.counting.largest else None
    return _refused(image, message, place, remedy)


def _refused(image: Qcow2Reader, message: str, offset: int, remedy: str | None = None) -> ImageError:
    text = f"{message}: the image cannot be written as it is"
    remedy = remedy or "run tapfs repair"
    return ImageError(ErrorKind.CORRUPT, text, path=image.file.path, offset=offset, op="open", remedy=remedy)


def _ignored(message: str, offset: int | None) -> None:
    """An entry that cannot be true is refused where it is used."""
