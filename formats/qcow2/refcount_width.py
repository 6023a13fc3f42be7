"""Count the clusters of a qcow2 image by numbers of another width: a second refcount structure beside the first.

What becomes durable, in this order:

1. the blocks and the table of the second structure, in a row behind all that is in use; nothing leads to them yet;
2. the head of the image, whose first sector leads to the table and says the width, in one write (`amend.py`);
3. holes where the first structure was.

The first structure does not count the clusters of the second one, and the second one says 0 for those of the first:
when one counts, nothing refers to the other. So no crash leaves a count that is wrong, only a file that is longer.
"""

from __future__ import annotations

from array import array
from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple

from tapfs.formats.changed_table import encode
from tapfs.formats.qcow2.amend_options import OP
from tapfs.formats.qcow2.counts import Counting
from tapfs.formats.qcow2.edited_image import EditedImage, in_plans, refused, require_sound
from tapfs.formats.qcow2.entries import BYTE_ORDER, new_words
from tapfs.formats.qcow2.header import MAX_REFTABLE_BYTES, WORD
from tapfs.formats.qcow2.refcounts import ClusterRun, Refcounts
from tapfs.formats.rounding import round_up
from tapfs.plan import Discard, Plan, Step, Write, plan


class SecondRefcounts(NamedTuple):
    """A refcount structure to which nothing leads yet: its table, and the clusters that are free once it counts."""

    offset: int
    clusters: int
    gone: Sequence[ClusterRun]


def require_countable(image: EditedImage, order: int) -> None:
    """Raise ImageError where the image is damaged, or numbers of ``2 ** order`` bits cannot say a count of it."""
    require_sound(image, OP)
    largest = Counting(order).largest
    for index, _ in image.refcounts.blocks():
        numbers = _numbers(image.refcounts, index * image.refcounts.per_block, image.refcounts.per_block)
        most = max(numbers)
        if most > largest:
            cluster = index * image.refcounts.per_block + numbers.index(most)
            width = "1 bit" if order == 0 else f"{1 << order} bits"
            message = f"{most} references lead to cluster {cluster}, which a refcount of {width} cannot count"
            raise refused(image, message, OP, "choose a larger refcount_bits, or delete snapshots first")


def second_refcounts(
    image: EditedImage, order: int, gone: Sequence[ClusterRun]
) -> Generator[Plan, None, SecondRefcounts]:
    """The plans of the first step. `gone` are clusters that will have no reference any more, besides."""
    bits, refcounts = image.header.cluster_bits, image.refcounts
    per_block = (8 << bits) >> order
    first = round_up(image.space.end, 1 << bits) >> bits
    used = [index for index in range(-(-refcounts.counted_end() // per_block)) if _is_used(image, index, per_block)]
    clusters, table, blocks = 0, 1, used
    while clusters != table + len(blocks):
        clusters = table + len(blocks)
        own = range(first // per_block, (first + clusters - 1) // per_block + 1)
        blocks = sorted({*used, *own})
        table = -(-(blocks[-1] + 1) * WORD >> bits)
    if table << bits > MAX_REFTABLE_BYTES:
        message = f"the refcount table would have more than {MAX_REFTABLE_BYTES} bytes"
        raise refused(image, message, OP, "choose a smaller refcount_bits")
    place = image.space.take_whole(clusters)
    old = [ClusterRun(refcounts.place >> bits, refcounts.table_length >> bits)]
    old += [ClusterRun(block >> bits, 1) for _, block in refcounts.blocks()]
    old += gone

    def steps() -> Iterator[Step]:
        entries = new_words(table << bits >> 3)
        for at, index in enumerate(blocks, table):
            entries[index] = place + (at << bits)
            numbers = _numbers(refcounts, index * per_block, per_block)
            for run in old:
                for cluster in _inside(run, index, per_block):
                    numbers[cluster] = 0
            for cluster in _inside(ClusterRun(first, clusters), index, per_block):
                numbers[cluster] = 1
            yield Write(0, entries[index], Counting(order).packed(numbers))
        yield Write(0, place, encode(entries, BYTE_ORDER))

    yield from in_plans(steps())
    return SecondRefcounts(place, table, old)


def freed_plan(image: EditedImage, second: SecondRefcounts) -> Plan:
    """The plan of the last step."""
    bits = image.header.cluster_bits
    return plan([Discard(0, run.first << bits, run.clusters << bits) for run in second.gone])


def _inside(run: ClusterRun, index: int, per_block: int) -> range:
    """The clusters of a run that a block counts, by their numbers in the block."""
    base = index * per_block
    return range(max(run.first - base, 0), min(run.first + run.clusters - base, per_block))


def _is_used(image: EditedImage, index: int, per_block: int) -> bool:
    numbers = _numbers(image.refcounts, index * per_block, per_block)
    return numbers.count(0) != len(numbers)


def _numbers(refcounts: Refcounts, first: int, count: int) -> array[int]:
    """The counts of the clusters from the number `first` on."""
    found = refcounts.counting.numbers(b"")
    while count:
        index, inside = divmod(first, refcounts.per_block)
        part = min(count, refcounts.per_block - inside)
        block = refcounts.block(index)
        if block is None:
            found.frombytes(bytes(part * found.itemsize))
        else:
            found.extend(refcounts.counting.numbers(block.tobytes())[inside : inside + part])
        first, count = first + part, count - part
    return found
