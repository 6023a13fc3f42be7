"""The entries of a damaged qcow2 image that name a table or cluster which another one of the disk has, for a repair.

Each gets a copy of its own. If a repair only counted both owners, neither would be "owned alone". After a write to one
of them the other one would have a refcount of 1 and no bit that says so, which every check calls an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tapfs.formats.qcow2.entries import COMPRESSED, COPIED, OFFSET
from tapfs.formats.qcow2.header import CRYPT_LUKS, WORD
from tapfs.formats.qcow2.owners import OWNED_BITS
from tapfs.formats.qcow2.reader import Qcow2Reader
from tapfs.formats.qcow2.references import References
from tapfs.formats.qcow2.tally import Tally
from tapfs.plan import Copy, Step, Write
from tapfs.records import NamedTuple

#: So much is copied at most. Where more is shared all owners are counted, and nothing is copied.
MAX_COPIED_BYTES = 1 << 30


class Doubled(NamedTuple):
    """An entry at `place` of the file with the word `word`; `times` places of the disk and of snapshots have it."""

    place: int
    word: int
    times: int = 1


class Copied(NamedTuple):
    """The steps that copy what entries named, and those that have the entries name the copies."""

    copies: list[Step]
    entries: list[Step]


def doubled_tables(image: Qcow2Reader, references: References) -> list[Doubled]:
    """The L1 entries of the disk whose L2 table an earlier one has; none if there are too many."""
    if _apart_by_themselves(image) or all(use.current <= 1 for use in references.tables):
        return []
    seen: set[int] = set()
    found: list[Doubled] = []
    for index, entry in image.l1.used():
        table = entry & OFFSET
        if table and image.slices.table_fault(table) is None:
            if table in seen:
                found.append(Doubled(image.l1_offset + WORD * index, entry))
            seen.add(table)
    return found if len(found) <= _most(image) else []


def doubled_entries(image: Qcow2Reader, references: References) -> list[Doubled]:
    """The L2 entries of the disk whose cluster an earlier one has, or a table; none if there are too many.

    Compressed clusters have no owner: many may lie in one cluster of the file.
    """
    found: list[Doubled] = []
    for place, times in _doubled(image, references) if not _apart_by_themselves(image) else ():
        word = int.from_bytes(image.file.read(place, WORD), "big")
        if not word & COMPRESSED:
            found.append(Doubled(place, word, times))
        if len(found) > _most(image):
            return []
    return found


def copied_tables(image: Qcow2Reader, found: list[Doubled], take: Callable[[int], int]) -> Copied:
    """Give each of these L1 entries a table of its own; `take` gives the place of so many clusters in a row."""
    size = image.header.cluster_size
    copied = Copied([], [])
    for place, word, _ in found:
        new = take(1)
        copied.copies.append(Write(0, new, image.file.read(word & OFFSET, size).ljust(size, b"\0")))
        copied.entries.append(Write(0, place, (new | word & COPIED).to_bytes(WORD, "big")))
    return copied


def copied_clusters(image: Qcow2Reader, found: list[Doubled], take: Callable[[int], int]) -> Copied:
    """Give each of these L2 entries a cluster of its own."""
    size = image.header.cluster_size
    copied = Copied([], [])
    for place, word, times in found:
        new, source = take(1), word & OFFSET
        copied.copies.append(Copy(0, new, source, min(size, image.file.size() - source)))
        wanted = word & ~(COPIED | OFFSET) | new | (COPIED if times == 1 else 0)
        copied.entries.append(Write(0, place, wanted.to_bytes(WORD, "big")))
    return copied


def _doubled(image: Qcow2Reader, references: References) -> Iterator[tuple[int, int]]:
    tally = Tally(image, references)
    waiting, done = {0}, set[int]()
    while waiting:
        number = waiting.pop()
        done.add(number)
        owners = tally.metadata_owners(number, OWNED_BITS)
        yield from tally.doubled_entries(owners)
        waiting |= owners.others - done


def _apart_by_themselves(image: Qcow2Reader) -> bool:
    """With LUKS clusters are encrypted by their place in the file: a copy elsewhere could not be read."""
    return image.header.has_data_file or image.header.crypt_method == CRYPT_LUKS


def _most(image: Qcow2Reader) -> int:
    return MAX_COPIED_BYTES >> image.header.cluster_bits
