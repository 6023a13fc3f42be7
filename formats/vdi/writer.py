"""Write a VDI image.

Slots have numbers. VirtualBox and QEMU give the next block the number that the header counts, so the slots in use must
be 0, 1, 2, … without gaps. Zeros are put in place, and no slot is taken from a block that has one. Slots that nothing
refers to are used before the file grows. A count that rises reaches the disk before the entries do, and one that falls
after them. After a crash the count may be ahead, which costs a block; were it behind, another writer would give a slot
away twice.

Blocks of an image over a parent are given up where the parent is to show again. All of them go when an overlay was
committed. Until the last one is gone the slots in use may have gaps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from tapfs.driver import BackingReference, Driver, HostFile, OpenRequest, Placement, Renewing
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Kind
from tapfs.formats.allocation import HostRange
from tapfs.formats.blocks.layout import Run
from tapfs.formats.blocks.writer import BlockWriter
from tapfs.formats.rounding import round_up
from tapfs.formats.uuid_links import identities_of
from tapfs.formats.vdi.driver import VdiDriver
from tapfs.formats.vdi.header import BLOCKS_AT
from tapfs.formats.vdi.rebase import expecting_plan, rebase_plan
from tapfs.identifiers import new_uuid
from tapfs.plan import Plan, Step, Write, plan


class WritableVdiDriver(VdiDriver, BlockWriter):
    """An open image, read-write: a :class:`tapfs.driver.Begun`."""

    unlinks = False

    def __init__(self, file: HostFile, request: OpenRequest) -> None:
        super().__init__(file, request)
        if self.header.blocks != self.layout.blocks:
            # The entries that the disk has no blocks for may name slots, which would be given away again.
            raise ImageError(
                ErrorKind.UNSUPPORTED,
                f"cannot write an image whose map has {self.header.blocks} entries for {self.layout.blocks} blocks",
                path=file.path,
                offset=BLOCKS_AT,
                op="open",
                remedy="make a copy of it with tapfs convert",
            )
        #: The new UUID of the last change, by which children know that this image is not as it was.
        self._modification = new_uuid()
        #: One more than the largest number of a slot in use: in memory, and in the plan.
        self._slots = self._slots_in_plan = self.header.allocated
        #: The least and the largest count that the file may have: a plan that has failed may have written another one.
        self._least_on_disk = self._most_on_disk = self.header.allocated
        #: Whether slots were given up, so that the largest number is to be looked for.
        self._gave_up = False

    @property
    def next_identities(self) -> frozenset[str]:
        """What an image over this one may write down before this one is written."""
        return identities_of(self.header.creation, self._modification)

    def begin(self) -> Plan:
        """The UUID of the last change becomes a new one, which tells children that their parent has changed."""
        self.header = self.header._replace(modification=self._modification)
        return plan([Write(0, self.header.places.modification, self._modification.bytes_le)])

    def end(self) -> Plan:
        """Nothing: the format has no mark for an image that is being written."""
        return Plan()

    def rebase(self, backing: BackingReference | None, parent: Driver | None) -> Iterator[Plan]:
        """See :mod:`tapfs.formats.vdi.rebase`."""
        yield rebase_plan(self, backing, parent)

    def expect(self, parent: Renewing | None) -> Iterator[Plan]:
        """See :func:`tapfs.formats.vdi.rebase.expecting_plan`."""
        yield expecting_plan(self, parent)

    def unused_slots(self) -> Sequence[HostRange]:
        """The gaps between the slots in use, and what the file has behind the last of them."""
        layout = self.layout
        runs = sorted((run.entry, run.blocks) for run in self._data_runs())
        gaps: list[HostRange] = []
        used = 0
        for entry, blocks in runs:
            if entry > used:
                gaps.append(HostRange(layout.slot(used), layout.slot(entry)))
            used = max(used, entry + blocks)
        end = layout.origin + round_up(max(0, self.file.size() - layout.origin), layout.slot_bytes)
        if layout.slot(used) < end:
            gaps.append(HostRange(layout.slot(used), end))
        self._slots = used
        return gaps

    def _data_runs(self) -> Iterator[Run]:
        return (run for run in self.runs(0, self.layout.blocks) if run.kind == Kind.DATA)

    def _highest_used(self) -> int:
        """One more than the largest number of a slot in the map."""
        return max((run.entry + run.blocks for run in self._data_runs()), default=0)

    def used_slots(self) -> int:
        """One more than the largest number of a slot in use."""
        self.unused_slots()
        return self._slots

    def move_entries(self, slots: Mapping[int, int]) -> None:
        """Have blocks lie in other slots, whose numbers the values are; the next flush says so."""
        for index, slot in slots.items():
            self.table.set(index, self.layout.same(slot, 1))
            self._slots = max(self._slots, slot + 1)

    def link(self, placement: Placement) -> None:
        """See :meth:`tapfs.formats.blocks.writer.BlockWriter.link`; the slots are counted."""
        super().link(placement)
        end = placement.host_offset + placement.length // self.layout.block_bytes * self.layout.slot_bytes
        self._slots = max(self._slots, (end - self.layout.payload_at - self.layout.origin) // self.layout.slot_bytes)

    @property
    def can_uncover(self) -> bool:
        """Whether blocks can show a parent again: there must be one."""
        return self.header.has_parent

    def give_up(self, slot: int, blocks: int) -> None:
        """See :meth:`tapfs.formats.blocks.writer.BlockWriter.give_up`; the slots are counted anew."""
        super().give_up(slot, blocks)
        self._gave_up = True

    def before_table(self) -> list[list[Step]]:
        """The count of slots, unless it falls."""
        if self._gave_up:
            self._slots = self._highest_used()
            self._gave_up = False
        self._slots_in_plan = self._slots
        before = max(self._slots, self._most_on_disk)
        steps = self._count_steps(before) if before != self._least_on_disk else []
        self._most_on_disk = before
        return steps

    def after_table(self) -> list[list[Step]]:
        """The count of slots, if it falls."""
        if self._slots_in_plan == self._most_on_disk:
            return []
        self._least_on_disk = min(self._least_on_disk, self._slots_in_plan)
        return self._count_steps(self._slots_in_plan)

    def _count_steps(self, count: int) -> list[list[Step]]:
        return [[Write(0, self.header.places.allocated, count.to_bytes(4, "little"))]]

    def flushed(self, executed: Plan) -> None:
        """What the last plan wrote is durable, what it released may be used again."""
        super().flushed(executed)
        if executed:
            self._least_on_disk = self._most_on_disk = self._slots_in_plan
            self.header = self.header._replace(allocated=self._slots_in_plan)
