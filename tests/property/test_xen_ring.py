"""Any bytes as a request, or as the segments of one, get an error or a right answer, and nothing else happens.

What is right is worked out here anew, from the public headers. The whole memory of the guest and the whole disk are
compared after each request. A stateful model drives many requests at once against an array of bytes.
"""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

import tapfs
from tapfs.kernel.xen_ring import Grants
from tests.unit.xen.xen_rings import DOMAIN, Served, new_machine, pattern
from tests.xen import blkif
from tests.xen.blkif import ERROR, NOT_SUPPORTED, OKAY, PAGE, SECTOR, Abi, Discard, Message, Operation
from tests.xen.frontend import Buffer, Frontend
from tests.xen.machine import Domain

SECTORS = 100
TAIL = b"\x99" * 300
INDIRECT_MAX = 20
DATA_PAGES = 6
KEPT_GRANTS = (1, 1, 1, 1, 3, 0)

READ, WRITE, BARRIER, FLUSH, DISCARD, INDIRECT = 0, 1, 2, 3, 5, 6


class Fields(NamedTuple):
    """Where an ABI has the fields of a slot."""

    size: int
    id: int
    sector: int
    segments: int
    sectors: int
    reference: int


FIELDS = {Abi.X86_32: Fields(108, 4, 12, 20, 20, 24), Abi.X86_64: Fields(112, 8, 16, 24, 24, 28)}
FIELDS[Abi.NATIVE] = FIELDS[Abi.X86_64]


class Piece(NamedTuple):
    reference: int
    first: int
    last: int


class Case(NamedTuple):
    """A slot, what the page of segments holds, and the grants of the data pages: 0 none, 1 to write, 3 to read.

    Pages that stay mapped keep the first grants that there were: a guest cannot take those back.
    """

    slot: bytes
    listing: bytes
    grants: tuple[int, ...]


class World:
    """A served disk with a guest whose whole memory is known."""

    def __init__(self, stack: ExitStack, abi: Abi, grants: Grants) -> None:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ring-")))
        machine = stack.enter_context(new_machine())
        self.path = folder / "disk"
        self.path.write_bytes(pattern(SECTORS) + TAIL)
        self.image = stack.enter_context(tapfs.open(self.path, format="raw", writable=True))
        self.abi, self.grants = abi, grants
        self.domain: Domain = machine.domain(DOMAIN, pages=16, references=64)
        self.frontend = stack.enter_context(Frontend(self.domain, abi=abi))
        self.served = stack.enter_context(
            Served(machine, self.frontend, self.image, grants=grants, indirect_segments=INDIRECT_MAX, threads=1)
        )
        self.buffer: Buffer = self.frontend.buffer(DATA_PAGES)
        self.references = self.buffer.references
        # It is mapped: the guest need not let us have it for data as well.
        for reference in self.frontend.ring.references:
            self.domain.set_grant(reference, 0)

    def page_of(self, reference: int, *, writing: bool) -> int | None:
        """The page that a grant is for, if it is for this."""
        entry = self.domain._entries[reference] if reference < self.domain.references else 0
        return entry >> 2 if entry & 1 and not (writing and entry & 2) and entry >> 2 < 16 else None

    def pieces(self, raw: bytes, count: int) -> list[Piece] | None:
        found = [Piece(*struct.unpack_from("<IBB", raw, 8 * i)) for i in range(count)]
        return found if all(piece.first <= piece.last < 8 for piece in found) else None

    def memory(self) -> dict[int, bytes]:
        """All pages but the ring's."""
        return {page: self.domain.read_page(page) for page in range(16) if page not in self.frontend.ring.pages}

    def check(self, case: Case) -> None:
        kinds = KEPT_GRANTS if self.grants is Grants.PERSISTENT else case.grants
        for reference, page, kind in zip(self.references, self.buffer.pages, kinds, strict=True):
            self.domain.set_grant(reference, page << 2 | kind if kind else 0)
        for number, page in enumerate(self.buffer.pages):
            self.domain.write_page(page, pattern(8, 100 + number))
        self.domain.write_page(self.buffer.pages[0], case.listing)
        self.image.write(0, pattern(SECTORS))
        memory, slot = self.memory(), case.slot.ljust(112, b"\0")
        ring = self.frontend.ring
        ring.put_raw(case.slot)
        ring.push()
        while ring.rsp_prod != ring.produced % blkif.WORD:
            ring.rsp_event = ring.produced
            if ring.rsp_prod != ring.produced % blkif.WORD:
                assert ring.port.wait(), ring
        response = blkif.decode_response(self.abi, ring.read_slot(ring.consumed))
        ring.consumed += 1
        self.judge(slot, memory, response)
        assert self.path.read_bytes()[SECTORS * SECTOR :] == TAIL
        assert self.served.device.problem() is None

    def judge(self, slot: bytes, memory: dict[int, bytes], response: blkif.Response) -> None:
        fields = FIELDS[self.abi]
        (request_id,) = struct.unpack_from("<Q", slot, fields.id)
        (sector,) = struct.unpack_from("<Q", slot, fields.sector)
        operation, status = slot[0], OKAY
        pieces: list[Piece] | None = []
        if operation == INDIRECT:
            operation = slot[1]
            count, (reference,) = struct.unpack_from("<H", slot, 2)[0], struct.unpack_from("<I", slot, fields.reference)
            page = self.page_of(reference, writing=False)
            if operation in (READ, WRITE) and 0 < count <= INDIRECT_MAX and page is not None:
                pieces = self.pieces(memory[page], count)
            else:
                pieces = None
            status = ERROR if pieces is None else OKAY
        elif operation in (READ, WRITE, BARRIER, FLUSH):
            count = slot[1]
            if count > 11 or (count == 0 and operation in (READ, WRITE)):
                status = ERROR
            else:
                pieces = self.pieces(slot[fields.segments :], count)
                status = ERROR if pieces is None else OKAY
        elif operation == DISCARD:
            (length,) = struct.unpack_from("<Q", slot, fields.sectors)
            status = OKAY if sector + length <= SECTORS else ERROR
        else:
            status = NOT_SUPPORTED
        wanted = bytearray(pattern(SECTORS))
        allowed: dict[tuple[int, int], list[bytes]] = {}  # (page, sector of it): what may be there
        disk = self.image.read(0, SECTORS * SECTOR)
        if operation == DISCARD and status == OKAY:
            part = disk[sector * SECTOR : (sector + length) * SECTOR]
            assert all(new in (0, old) for new, old in zip(part, wanted[sector * SECTOR :], strict=False))
            wanted[sector * SECTOR : (sector + length) * SECTOR] = part
        elif pieces and status == OKAY:
            status = self.moved(operation, sector, pieces, memory, wanted, allowed)
        assert (response.id, response.operation, response.status) == (request_id, operation, status)
        assert disk == wanted
        for page, before in memory.items():
            now = self.domain.read_page(page)
            for piece in range(8):
                at = slice(piece * SECTOR, (piece + 1) * SECTOR)
                may = allowed.get((page, piece), [before[at]])
                assert now[at] in may, f"page {page} sector {piece}"

    def moved(
        self,
        operation: int,
        sector: int,
        pieces: Sequence[Piece],
        memory: dict[int, bytes],
        disk: bytearray,
        allowed: dict[tuple[int, int], list[bytes]],
    ) -> int:
        """The status of a request whose fields are well, and what it does."""
        total = sum(piece.last - piece.first + 1 for piece in pieces)
        if sector + total > SECTORS:
            return ERROR
        pages = [self.page_of(piece.reference, writing=operation == READ) for piece in pieces]
        status = ERROR if None in pages else OKAY
        data, at = bytearray(), sector
        for piece, page in zip(pieces, pages, strict=True):
            for number in range(piece.first, piece.last + 1):
                if operation == READ and page is not None:
                    old = memory[page][number * SECTOR : (number + 1) * SECTOR]
                    # Two segments may name one place, and of a read that fails a part may have been done.
                    may = allowed.setdefault((page, number), [old] if status == ERROR else [])
                    may.append(bytes(disk[at * SECTOR : (at + 1) * SECTOR]))
                elif page is not None:
                    data += memory[page][number * SECTOR : (number + 1) * SECTOR]
                at += 1
        if operation != READ and status == OKAY:
            disk[sector * SECTOR : sector * SECTOR + len(data)] = data
        return status


@contextmanager
def world(abi: Abi, grants: Grants) -> Iterator[World]:
    with ExitStack() as stack:
        made = World(stack, abi, grants)
        yield made
        made.buffer.close()


edges_64 = st.one_of(
    st.integers(0, SECTORS + 2), st.sampled_from([1 << 55, (1 << 55) + 3, (1 << 63), (1 << 64) - 1, (1 << 64) - 8])
)


def slots(abi: Abi, references: Sequence[int]) -> st.SearchStrategy[Case]:
    """Requests that are often nearly right, and bytes that are not."""
    fields = FIELDS[abi]
    reference = st.one_of(st.sampled_from(references), st.sampled_from(references), st.integers(0, (1 << 32) - 1))
    place = st.one_of(st.just((0, 7)), st.tuples(st.integers(0, 8), st.integers(0, 8)).map(sorted).map(tuple))
    piece = st.tuples(reference, place).map(lambda pair: struct.pack("<IBBxx", pair[0], *pair[1]))
    pieces = st.lists(piece, max_size=12)
    noise = st.lists(st.tuples(st.integers(0, 111), st.integers(0, 255)), max_size=2)

    def put(raw: bytearray, at: int, data: bytes) -> None:
        raw[at : at + len(data)] = data

    @st.composite
    def build(draw: st.DrawFn) -> Case:
        raw = bytearray(112)
        grants = draw(st.tuples(*[st.sampled_from([1, 1, 1, 1, 3, 0])] * DATA_PAGES))
        listing = bytes(PAGE)
        put(raw, fields.id, draw(st.binary(min_size=8, max_size=8)))
        put(raw, fields.sector, struct.pack("<Q", draw(edges_64)))
        raw[0] = operation = draw(st.sampled_from([0, 0, 1, 1, 2, 3, 5, 6, 6, 4, 7, 255]))
        if operation == DISCARD:
            raw[1] = draw(st.integers(0, 255))
            put(raw, fields.sectors, struct.pack("<Q", draw(edges_64)))
        elif operation == INDIRECT:
            raw[1] = draw(st.sampled_from([0, 0, 1, 1, 2, 3, 5, 6]))
            segments = draw(st.lists(piece, max_size=INDIRECT_MAX + 1))
            count = draw(st.one_of(st.just(len(segments)), st.integers(0, 0xFFFF)))
            put(raw, 2, struct.pack("<H", count))
            put(raw, fields.reference, struct.pack("<I", draw(st.one_of(st.just(references[0]), reference))))
            listing = b"".join(segments) + draw(st.binary(max_size=64))
        else:
            segments = draw(pieces)
            raw[1] = draw(st.one_of(st.just(len(segments)), st.integers(0, 255)))
            put(raw, fields.segments, b"".join(segments[:11]))
        for at, value in draw(noise):
            raw[at] = value
        return Case(bytes(raw[: fields.size]), listing.ljust(PAGE, b"\0")[:PAGE], grants)

    anything = st.builds(
        Case,
        st.binary(min_size=fields.size, max_size=fields.size),
        st.binary(max_size=256).map(lambda data: data.ljust(PAGE, b"\xff")),
        st.just((1,) * DATA_PAGES),
    )
    return st.one_of(build(), build(), build(), anything)


@pytest.mark.parametrize("grants", Grants)
@pytest.mark.parametrize("abi", [Abi.X86_32, Abi.X86_64])
def test_any_request(abi: Abi, grants: Grants) -> None:
    with world(abi, grants) as made:

        @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
        @given(slots(abi, made.references))
        def check(case: Case) -> None:
            made.check(case)

        check()


# ---- many requests at once, against an array of bytes

MODEL_SECTORS = 1024 + 7
MODEL_SIZE = MODEL_SECTORS * SECTOR

extents = st.tuples(st.integers(0, MODEL_SECTORS - 1), st.integers(1, 60)).map(
    lambda pair: (pair[0], min(pair[1], MODEL_SECTORS - pair[0]))
)
batches = st.lists(
    st.tuples(st.sampled_from([READ, READ, WRITE, WRITE, WRITE, BARRIER, FLUSH, DISCARD]), extents, st.integers(0, 99)),
    min_size=1,
    max_size=24,
)


class RingModel(RuleBasedStateMachine):
    """A qcow image behind two rings; requests that are on their way together do not overlap."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()

    @initialize(abi=st.sampled_from(Abi), grants=st.sampled_from(Grants))
    def begin(self, abi: Abi, grants: Grants) -> None:
        self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix="ring-")))
        self.machine = self.stack.enter_context(new_machine())
        tapfs.create(str(self.folder / "disk"), "qcow", MODEL_SIZE)
        self.image = tapfs.open(self.folder / "disk", writable=True)
        self.frontend = self.stack.enter_context(
            Frontend(
                self.machine.domain(DOMAIN, pages=4096, references=8192),
                abi=abi,
                queues=2,
                indirect_segments=32,
                persistent=grants is Grants.PERSISTENT,
            )
        )
        self.journal = os.memfd_create("journal")
        self.stack.callback(os.close, self.journal)
        self.model = bytearray(MODEL_SIZE)
        self.serve(grants)

    def serve(self, grants: Grants) -> None:
        self.served = Served(self.machine, self.frontend, self.image, grants=grants, journal=self.journal, threads=1)

    @rule(batch=batches)
    def requests(self, batch: list[tuple[int, tuple[int, int], int]]) -> None:
        busy: set[int] = set()
        under_way: dict[int, dict[int, tuple[int, int, int, Buffer | None]]] = {0: {}, 1: {}}
        pages: list[Buffer] = []
        for turn, (operation, (sector, longest), seed) in enumerate(batch):
            count = min(longest, 88) if operation == BARRIER else longest  # a barrier cannot be indirect
            sectors = set(range(sector, sector + count))
            if operation != FLUSH and busy & sectors:
                continue
            busy |= sectors
            ring = self.frontend.rings[turn % 2]
            buffer = None
            message: Message
            if operation == FLUSH:
                message = blkif.Request(Operation.FLUSH)
            elif operation == DISCARD:
                message = Discard(sector, count)
            else:
                buffer = self.frontend.buffer(-(-count // 8))
                buffer.write(pattern(count, seed))
                message, listing = self.frontend.message(operation, sector, buffer.segments(count))
                pages += [buffer] if listing is None else [buffer, listing]
            under_way[turn % 2][ring.put(message)] = operation, sector, count, buffer
            if seed % 3 == 0:
                ring.push()
        for number, ring in enumerate(self.frontend.rings):
            ring.push()
            for response in ring.wait(len(under_way[number])):
                operation, sector, count, buffer = under_way[number][response.id]
                assert response.status == OKAY
                at = slice(sector * SECTOR, (sector + count) * SECTOR)
                if operation == READ and buffer is not None:
                    assert buffer.read()[: count * SECTOR] == self.model[at]
                elif operation in (WRITE, BARRIER) and buffer is not None:
                    self.model[at] = buffer.read()[: count * SECTOR]
                elif operation == DISCARD:
                    now = self.image.read(sector * SECTOR, count * SECTOR)
                    assert all(new in (0, old) for new, old in zip(now, self.model[at], strict=True))
                    self.model[at] = now
        for buffer in pages:
            self.frontend.put_back(buffer)

    @rule()
    def pause(self) -> None:
        self.served.device.pause()
        assert self.image.read(0, MODEL_SIZE) == self.model
        self.served.device.resume()

    @rule(grants=st.sampled_from(Grants))
    def succeed(self, grants: Grants) -> None:
        self.served.close()
        # A guest that grants its pages for one request only must not find them mapped for longer.
        self.serve(grants if self.frontend.persistent else Grants(grants % 2))

    @rule()
    def open_again(self) -> None:
        self.served.device.pause()
        self.image.close()
        self.image = tapfs.open(self.folder / "disk", writable=True)
        self.served.replace(self.image)
        self.served.device.resume()

    def teardown(self) -> None:
        if hasattr(self, "served"):
            self.served.close()
            assert self.image.read(0, MODEL_SIZE) == self.model
            self.image.close()
        self.stack.close()


def test_many_requests_at_once() -> None:
    run_state_machine_as_test(
        RingModel,
        settings=settings(
            max_examples=15, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
