"""The L2 tables that a scan of a damaged qcow2 image has found, each at the L1 entry that it belongs to, if that shows.

The order of trust: an entry that leads to a table; the same entry of another L1 table in the file, for entries that are
damaged; if asked, the order of the tables in the file. Nothing else is known, so nothing else is done.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from tapfs.driver import HostFile
from tapfs.formats.qcow2.entries import COPIED, OFFSET, new_words
from tapfs.formats.qcow2.table_scan import FoundTables, TableScan, entries_per_table

#: An L1 entry that no driver follows: it stands for a table that is lost.
_LOST = COPIED | 1 << 55
#: So many places are named in one message.
_MOST_NAMED = 5


class OldTable:
    """An L1 table of the file, and where it lies: of a snapshot, or left behind by one that grew."""

    def __init__(self, place: int, words: array[int]) -> None:
        self.place = place
        self.words = words


class PlacedTables:
    """L2 tables by the index of their L1 entry. `rebuilt` and `doubts` are told: see :class:`tapfs.salvage.Salvage`."""

    def __init__(self, file: HostFile, scan: TableScan, tables: FoundTables) -> None:
        self._file = file
        self._scan = scan
        self._second = frozenset(tables.second)
        #: Tables that no entry leads to.
        self.spare = set(tables.second)
        #: The place of the table of each index; those that are lost are not in it.
        self.placed: dict[int, int] = {}
        #: Indexes whose entry is damaged.
        self.lost: list[int] = []
        self.rebuilt: list[str] = []
        self.doubts: list[str] = []
        self._places: set[int] = set()
        self._blank: dict[int, bool] = {}

    def leads(self, word: int) -> bool:
        """Whether an entry leads to a table, or to a cluster of zeros, which is a table of nothing."""
        place = word & OFFSET
        if place in self._second:
            return True
        rules = self._scan.rules
        if place % rules.cluster or not rules.cluster <= place < rules.file_size:
            return False
        if place not in self._blank:
            self._blank[place] = not self._file.read(place, rules.cluster).strip(b"\0")
        return self._blank[place]

    def take(self, words: Sequence[int]) -> None:
        """Place the tables that the entries of an L1 table lead to; entries that lead to none are lost."""
        for index, word in enumerate(words):
            if word and self.leads(word):
                self._place(index, word & OFFSET)
            elif word:
                self.lost.append(index)

    def belong_elsewhere(self, words: Sequence[int]) -> None:
        """The tables of another disk of the image, as a snapshot is one, are missed by nobody."""
        self.spare.difference_update(word & OFFSET for word in words)

    def fill_from(self, others: Sequence[OldTable]) -> None:
        """Fill damaged entries from other L1 tables."""
        for index in list(self.lost):
            copies = {each.words[index] & OFFSET: each.place for each in others if index < len(each.words)}
            for table, place in copies.items():
                if table in self._second and table not in self._places:
                    self._place(index, table)
                    self.lost.remove(index)
                    self.rebuilt.append(f"L1 entry {index}, from an L1 table at {place:#x}")
                    break

    def drop_data(self) -> None:
        """What is data of the disk is no table that is missed: a guest may keep images of its own."""
        for place in self.placed.values():
            if not self.spare:
                break
            self.spare.difference_update(self._scan.targets(place))

    def place_in_order(self) -> None:
        """Put tables that nothing names where one is missing: before those that lie behind them in the file."""
        anchors = sorted(self.placed.items())
        guessed = len(self.spare)
        for table in sorted(self.spare):
            after = max((index for index, place in anchors if place < table), default=-1)
            index = next((lost for lost in self.lost if lost > after), None)
            if index is None:
                index = after + 1
                while index in self.placed:
                    index += 1
            else:
                self.lost.remove(index)
            self._place(index, table)
            anchors.append((index, table))
        self.doubts.append(
            f"the places of {guessed} L2 tables on the disk are guessed by their order in the file: each maps"
            f" {self._span} bytes"
        )

    def tell_lost(self) -> None:
        """Say what could not be placed."""
        if self.lost:
            self.doubts.append(
                f"{len(self.lost)} L1 entries are damaged and have no copy: {_some(self.lost, '{}')};"
                f" each maps {self._span} bytes"
            )
        if self.spare:
            places = _some(sorted(self.spare), "{:#x}")
            self.doubts.append(f"{len(self.spare)} L2 tables are named by no L1 entry: at {places}")

    def entries(self, count: int) -> array[int]:
        """An L1 table of at least `count` entries. None says that its table is owned alone: nothing is written."""
        words = new_words(max([count, *(index + 1 for index in (*self.placed, *self.lost))]))
        for index in self.lost:
            words[index] = _LOST
        for index, place in self.placed.items():
            words[index] = place
        return words

    @property
    def _span(self) -> int:
        """Bytes of the disk that a table maps."""
        return entries_per_table(self._scan.rules) * self._scan.rules.cluster

    def _place(self, index: int, table: int) -> None:
        self.placed[index] = table
        self._places.add(table)
        self.spare.discard(table)


def _some(numbers: Sequence[int], form: str) -> str:
    named = ", ".join(form.format(each) for each in numbers[:_MOST_NAMED])
    return f"{named} …" if len(numbers) > _MOST_NAMED else named
