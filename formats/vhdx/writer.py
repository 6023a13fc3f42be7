"""Write a VHDX image.

An image says that it is being written: its header names a log, and has new GUIDs for the file and for the disk's
contents. What `begin` makes durable, in this order:

1. an entry of the new log that changes nothing, so that the log is never without a valid entry once a header names it;
2. a header that names the log, in the slot of the older header;
3. the same in the other slot.

What a flush makes durable, in this order:

1. the length of the file, alone; the barrier after it makes the guest's data durable, too;
2. an entry of the log with every page of metadata that changes: a crash from here on keeps them all;
3. these pages in place;
4. holes where blocks were released, which nothing on disk points at any more.

More pages than one entry may have go in several rounds of 2 and 3. A sector bitmap goes before the entries of its
blocks, and the entry of a sector bitmap not after those of its blocks. So what a crash leaves after any round is whole.

`end` writes headers without a log, twice. Formats without a parent are written by whole blocks, a differencing image by
sectors: the first write to a block takes the whole of it, and the sector bitmap says which of its sectors are used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tapfs.driver import HostFile, OpenRequest, Operation, Reservation
from tapfs.extent import Range
from tapfs.formats.apart import require_apart
from tapfs.formats.rounding import round_down, round_up
from tapfs.formats.vhdx.driver import VhdxDriver
from tapfs.formats.vhdx.guids import NO_GUID, new_guid
from tapfs.formats.vhdx.header import Header, Headers, header_steps
from tapfs.formats.vhdx.locator import identity
from tapfs.formats.vhdx.log_entry import LoggedPage
from tapfs.formats.vhdx.log_ring import LogRing
from tapfs.formats.vhdx.sectors import Sectors
from tapfs.formats.vhdx.space import Space, places
from tapfs.formats.vhdx.units import MIB, PAGE
from tapfs.formats.vhdx.whole_blocks import WholeBlocks
from tapfs.plan import Discard, Grow, Plan, Step, Write, plan

_RELEASED_RANGE_BYTES = 128


class WritableVhdxDriver(VhdxDriver):
    """An open image, read-write: a :class:`tapfs.driver.WritableDriver` that is `Begun`."""

    def __init__(self, file: HostFile, request: OpenRequest, headers: Headers) -> None:
        super().__init__(file, request, headers)
        if not request.lenient:
            require_apart(places(self), MIB, file.path, what="blocks")
        self.space = Space(self)
        if not self.header.log_length:
            # A file may have no log; a writer needs one.
            place = self.space.allocation.tail(MIB)
            self.space.allocation.commit(place, MIB)
            self.header = self.header._replace(log_offset=place, log_length=MIB)
            self.add_reserved(Range(place, MIB))
        self.space.use_log(Range(self.header.log_offset, self.header.log_length))
        self._ring = LogRing(file, self.header)
        self._ways = Sectors(self, self.space) if self.metadata.has_parent else WholeBlocks(self, self.space)
        #: The plan that `begin` has returned, until `end`.
        self._beginning: Plan | None = None
        self._next_data_write: bytes | None = None

    # -- the begin and the end of writing -------------------------------------------------------

    def begin(self) -> Plan:
        """The plan described at the head of this module; the same one when it is asked for again."""
        if self._beginning is None:
            self._beginning = self.log_named(self.next_data_write)
            self._next_data_write = None
        return self._beginning

    @property
    def next_data_write(self) -> bytes:
        """The GUID that the disk's contents will have once the next `begin` is executed."""
        if self._next_data_write is None:
            self._next_data_write = new_guid()
        return self._next_data_write

    @property
    def next_identities(self) -> frozenset[str]:
        """What an image over this one may write down before this one is written."""
        return frozenset({identity(self.next_data_write)})

    def log_named(self, data_write: bytes | None = None) -> Plan:
        """The plan after which the headers name a log; None: the disk's contents stay, and so does their GUID."""
        data_write = self.header.data_write if data_write is None else data_write
        begun = self.header._replace(log=new_guid(), file_write=new_guid(), data_write=data_write)
        self._ring.begin_plan()
        size = self.file.size()
        entry = self._ring.entry(begun.log, [], flushed_bytes=round_down(size, MIB), last_bytes=round_up(size, MIB))
        return plan(self._grow_steps(), entry, *self._header_stages(begun))

    def end(self) -> Plan:
        """Headers without a log: every change is in its place."""
        self._beginning = None
        if self.header.log == NO_GUID:
            return Plan()
        return plan(*self._header_stages(self.header._replace(log=NO_GUID)))

    def _header_stages(self, header: Header) -> Iterator[list[Step]]:
        """Write a header into both slots, into that of the older header first. The current slot stays the same."""
        for slot in (1 - self.slot, self.slot):
            header = header._replace(sequence=header.sequence + 1)
            yield header_steps(header, slot)
        self.header = header

    # -- reservations ---------------------------------------------------------------------------

    def reserve(self, ranges: Sequence[Range], operation: Operation) -> Reservation:
        """See :meth:`tapfs.driver.WritableDriver.reserve`.

        Raises ImageError(corrupt) for an impossible entry of the block table, (no_space) at the largest file.
        """
        reservation = self._ways.reserve(ranges, operation)
        self.note_end(self.space.allocation.end)
        return reservation

    def commit(self, reservation: Reservation) -> None:
        """Publish the new map; durable after the next flush."""
        self._ways.commit(reservation)
        self.space.log_has_space()
        self.note_end(self.space.allocation.end)

    def abort(self, reservation: Reservation) -> None:
        """Give the places back. They are punched by the next flush and used again after it."""
        self._ways.abort(reservation)

    @property
    def can_uncover(self) -> bool:
        """Whether blocks can show the parent again, one by one: they can."""
        return self.metadata.has_parent

    # -- flush ----------------------------------------------------------------------------------

    @property
    def unflushed_bytes(self) -> int:
        """Memory held by changed pages and released ranges."""
        return self.pages.changed_bytes + self.space.allocation.noted * _RELEASED_RANGE_BYTES

    def flush(self) -> Plan:
        """The plan described at the head of this module; empty where nothing has changed.

        Raises ImageError(io) where failed flushes have filled the log.
        """
        released = self.space.allocation.begin_plan()
        changed = self.pages.begin_plan()
        if not changed and not released:
            return Plan()
        self._ring.begin_plan()
        return plan(
            self._grow_steps(),
            *self._logged_stages(changed),
            [Discard(0, piece.start, piece.end - piece.start) for piece in released],
        )

    def flushed(self, executed: Plan) -> None:
        """What the last plan wrote is durable, what it released may be used again."""
        if not executed:
            return
        self.pages.plan_done()
        self.space.allocation.plan_done()
        self._ring.plan_done()

    def _grow_steps(self) -> list[Step]:
        """The length in whole MiB that the file must have before an entry of the log claims it."""
        end = self.space.allocation.committed_end
        return [Grow(0, end)] if end > self.space.allocation.durable_end or end > self.file.size() else []

    def _logged_stages(self, changed: Sequence[int]) -> Iterator[list[Step]]:
        table = self.regions.bat
        in_table = [at for at in changed if table.offset <= at < table.end]
        bitmaps = [at for at in changed if not table.offset <= at < table.end]
        # From the end of the table on: the entry of a sector bitmap follows those of its blocks.
        ordered = bitmaps + in_table[::-1]
        end = self.space.allocation.committed_end
        for start in range(0, len(ordered), self._ring.most_pages):
            some = sorted(ordered[start : start + self._ring.most_pages])
            pages = [LoggedPage(at, bytes(self.pages.changed[at])) for at in some]
            yield self._ring.entry(self.header.log, pages, flushed_bytes=end, last_bytes=end)
            yield [Write(0, at, data) for at, data in _joined(pages)]


def _joined(pages: Sequence[LoggedPage]) -> list[tuple[int, bytes]]:
    """Ascending pages as few writes."""
    runs: list[list[LoggedPage]] = []
    for page in pages:
        if runs and runs[-1][-1].offset + PAGE == page.offset:
            runs[-1].append(page)
        else:
            runs.append([page])
    return [(run[0].offset, b"".join(page.data for page in run)) for run in runs]
