"""Refuse to write a qcow2 image in which several entries refer to one cluster and its refcount does not say so.

A cluster whose entry says that it is owned alone is written in place, and the write would change what another entry
shows. A cluster with a refcount below its references is free too early: its place is given away, or is made a hole.

All L2 tables are read for that, which takes as long as a check does. So an image with more of them is not looked at.
A refcount that is too high is a leak, such as a crash leaves, and keeps nobody from writing.
"""

from __future__ import annotations

from itertools import islice

from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.apart import REMEDY
from tapfs.formats.qcow2.counted_entries import WINDOW_BITS
from tapfs.formats.qcow2.entries import COPIED, OFFSET
from tapfs.formats.qcow2.header import WORD
from tapfs.formats.qcow2.reader import Qcow2Reader
from tapfs.formats.qcow2.refcounts import Refcounts
from tapfs.formats.qcow2.references import References
from tapfs.formats.qcow2.tally import Tally
from tapfs.references import CountedWindow

#: Bytes of the L2 tables of an image that is looked at: two million entries.
MAX_TABLE_BYTES = 16 << 20
#: L1 entries of the disk and of all snapshots of an image that is looked at; they are walked in Python.
_MAX_L1_ENTRIES = 1 << 14
#: Clusters of the file of an image that is looked at; each takes a byte meanwhile.
_MAX_CLUSTERS = 1 << 23

#: Counts and refcounts of one byte are compared by one subtraction of long numbers while they are below this.
_LOW = 0x7F
_AT_MOST_LOW = bytes(min(number, _LOW) for number in range(256))
_BELOW_LOW = bytes(range(_LOW))
_AT_MOST_ONE = bytes(number <= 1 for number in range(256))


def require_owners(image: Qcow2Reader, refcounts: Refcounts) -> None:
    """Raise ImageError(corrupt) if a cluster of data or an L2 table has more references than its refcount says.

    So it does if an entry says that it owns alone what another one refers to, too. The offset is that of the cluster or
    of the entry. Clusters of a data file have no refcounts; they lie where the disk has them.
    """
    references = _references(image)
    if references is None:
        return
    _require_tables(image, refcounts, references)
    tally = Tally(image, references)
    window = tally.entries()
    _require_counts(image, refcounts, window)
    if window.width == 1 and not window.counts.translate(None, b"\0\1"):
        return
    if window.width == 1:
        alone = window.counts.translate(_AT_MOST_ONE)
    else:
        alone = bytearray(count <= 1 for count in window.references(0, window.clusters))
    step = image.header.l2_entry_bytes
    for use in references.tables:
        for at in tally.wrong_owners(use, 0, alone) if use.current else ():
            place = use.place + at * step
            word = int.from_bytes(image.file.read(place, WORD), "big")
            if word & COPIED:
                raise _refused(image, f"L2 entry {at}: {_alone(word)}", place)


def _references(image: Qcow2Reader) -> References | None:
    """None for an image that has no tables, or too many."""
    header = image.header
    file_clusters = -(-image.file.size() >> header.cluster_bits)
    if header.has_data_file or file_clusters > min(_MAX_CLUSTERS, 1 << WINDOW_BITS):
        return None
    l1_entries = sum(1 for _ in islice(image.l1.used(), _MAX_L1_ENTRIES + 1))
    l1_entries += sum(each.l1_entries for each in image.read_snapshots())
    if not 0 < l1_entries <= _MAX_L1_ENTRIES:
        return None
    references = References(image, _ignored)
    return None if len(references.tables) << header.cluster_bits > MAX_TABLE_BYTES else references


def _require_tables(image: Qcow2Reader, refcounts: Refcounts, references: References) -> None:
    shared = {use.place: use.times for use in references.tables if use.times > 1}
    for place, times in shared.items():
        number = _refcount(refcounts, place >> image.header.cluster_bits)
        if number is not None and number < times:
            raise _too_low(image, refcounts, "L2 table", place, number, times)
    for index, entry in image.l1.used() if shared else ():
        if entry & COPIED and entry & OFFSET in shared:
            raise _refused(image, f"L1 entry {index}: {_alone(entry)}", image.l1_offset + WORD * index)


def _require_counts(image: Qcow2Reader, refcounts: Refcounts, window: CountedWindow) -> None:
    """Compare references with refcounts, one block of these after the other."""
    counting = refcounts.counting
    for low in range(0, window.clusters, refcounts.per_block):
        high = min(low + refcounts.per_block, window.clusters)
        wanted = window.references(low, high)
        if wanted.count(0) == high - low:
            continue
        try:
            block = refcounts.block(low // refcounts.per_block)
        except ImageError:  # whoever has to change a damaged block refuses to
            continue
        raw = bytes(image.header.cluster_size) if block is None else block.tobytes()
        if window.width == 1 and _reach(counting.capped(raw)[: high - low], wanted.tobytes()):
            continue
        for at, (number, count) in enumerate(zip(counting.numbers(raw), wanted, strict=False)):
            if number < count:
                place = (low + at) << image.header.cluster_bits
                raise _too_low(image, refcounts, "cluster", place, number, count)


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
