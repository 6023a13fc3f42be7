"""Large reads of a RAM disk, which a ring copies to the guest out of the host's own memory."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

import tapfs
from tapfs.host import ram
from tapfs.kernel.xen_ring import Grants
from tests.unit.xen.xen_rings import DOMAIN, Served, new_machine, pattern
from tests.xen import blkif
from tests.xen.blkif import ERROR, OKAY, PAGE, SECTOR, Operation
from tests.xen.frontend import Frontend
from tests.xen.machine import Machine

PAGES = 256
SECTORS = PAGES * PAGE // SECTOR
#: Pages of the reads here: from 16 KiB on they are borrowed.
LARGE, SMALL = 8, 3


@pytest.fixture
def machine() -> Iterator[Machine]:
    with new_machine() as made:
        yield made


@pytest.fixture
def disk() -> Iterator[str]:
    """The name of a RAM disk whose pages are all there."""
    name = f"ram:borrowed-{secrets.token_hex(8)}"
    tapfs.create(name, "ram", PAGES * PAGE)
    Path(ram.host_path(name)).write_bytes(pattern(SECTORS))
    yield name
    os.unlink(ram.host_path(name))


def read(frontend: Frontend, page: int, pages: int) -> bytes:
    return frontend.read(page * PAGE // SECTOR, pages * PAGE // SECTOR)


def expected(page: int, pages: int) -> bytes:
    return pattern(SECTORS)[page * PAGE : (page + pages) * PAGE]


@pytest.mark.parametrize(
    ("grants", "pages", "borrowed"),
    [(Grants.COPY, LARGE, 1), (Grants.COPY, SMALL, 0), (Grants.MAP, LARGE, 0), (Grants.PERSISTENT, LARGE, 0)],
)
def test_which_reads_are_borrowed(machine: Machine, disk: str, grants: Grants, pages: int, borrowed: int) -> None:
    with (
        tapfs.open(disk, writable=True) as image,
        Frontend(machine.domain(DOMAIN), persistent=grants is Grants.PERSISTENT) as frontend,
        Served(machine, frontend, image, grants=grants) as served,
    ):
        assert read(frontend, 5, pages) == expected(5, pages)
        seen = served.device.statistics()
        assert (seen.borrowed, seen.at_once, seen.read_bytes) == (borrowed, 1, pages * PAGE)


def test_what_was_written_is_read(machine: Machine, disk: str) -> None:
    with (
        tapfs.open(disk, writable=True) as image,
        Frontend(machine.domain(DOMAIN), indirect_segments=64) as frontend,
        Served(machine, frontend, image) as served,
    ):
        for seed in range(1, 5):
            frontend.write(3, pattern(200, seed))
            assert frontend.read(0, SECTORS) == pattern(3) + pattern(200, seed) + pattern(SECTORS)[203 * SECTOR :]
        assert served.device.statistics().borrowed >= 4


def test_a_hole_is_read_and_stays_one(machine: Machine, disk: str) -> None:
    with (
        tapfs.open(disk, writable=True) as image,
        Frontend(machine.domain(DOMAIN)) as frontend,
        Served(machine, frontend, image) as served,
    ):
        assert read(frontend, 8, LARGE) == expected(8, LARGE)
        frontend.discard(8 * PAGE // SECTOR, LARGE * PAGE // SECTOR)
        taken = os.stat(ram.host_path(disk)).st_blocks
        assert taken * 512 == (PAGES - LARGE) * PAGE
        for page in range(4, 16):
            hole = [bytes(PAGE) if 8 <= each < 8 + LARGE else expected(each, 1) for each in range(page, page + LARGE)]
            assert read(frontend, page, LARGE) == b"".join(hole)
        assert os.stat(ram.host_path(disk)).st_blocks == taken
        assert served.device.statistics().borrowed == 1


def test_a_disk_that_is_cut_while_it_is_read_fails_where_it_was_cut(machine: Machine, disk: str) -> None:
    with (
        tapfs.open(disk) as image,
        Frontend(machine.domain(DOMAIN)) as frontend,
        Served(machine, frontend, image) as served,
    ):
        assert read(frontend, PAGES - LARGE, LARGE) == expected(PAGES - LARGE, LARGE)
        os.truncate(ram.host_path(disk), (PAGES - LARGE // 2) * PAGE)
        pages = [PAGES - LARGE, 0, PAGES - LARGE // 2]
        buffers = [frontend.buffer(LARGE if page != pages[2] else LARGE // 2) for page in pages]
        ids = frontend.ring.submit(
            *(
                blkif.Request(Operation.READ, page * PAGE // SECTOR, buffer.segments(len(buffer.references) * 8))
                for page, buffer in zip(pages, buffers, strict=True)
            )
        )
        answers = {response.id: response.status for response in frontend.ring.wait(len(ids))}
        assert [answers[i] for i in ids] == [ERROR, OKAY, ERROR]
        assert buffers[1].read() == expected(0, LARGE)
        assert served.device.statistics().errors == 2
        for buffer in buffers:
            buffer.close()


def test_what_a_disk_has_grown_by_is_read(machine: Machine, disk: str) -> None:
    with (
        tapfs.open(disk, writable=True) as image,
        Frontend(machine.domain(DOMAIN)) as frontend,
        Served(machine, frontend, image) as served,
    ):
        assert read(frontend, 0, LARGE) == expected(0, LARGE)
        os.truncate(ram.host_path(disk), 2 * PAGES * PAGE)
        with tapfs.open(disk) as grown:
            served.device.pause()
            served.device.replace_disk(grown.engine_disk, writable=False, discard=False)
            served.device.resume()
            assert read(frontend, PAGES, LARGE) == bytes(LARGE * PAGE)
            assert read(frontend, PAGES - LARGE, LARGE) == expected(PAGES - LARGE, LARGE)
            served.device.pause()
            served.device.replace_disk(image.engine_disk, writable=True, discard=True)
            served.device.resume()


def test_of_merged_requests_only_the_one_fails_whose_page_is_not_granted(machine: Machine, disk: str) -> None:
    domain = machine.domain(DOMAIN)
    with (
        tapfs.open(disk, writable=True) as image,
        Frontend(domain) as frontend,
        Served(machine, frontend, image) as served,
    ):
        buffers = [frontend.buffer(1) for _ in range(9)]
        domain.set_grant(buffers[4].references[0], 0)
        ids = frontend.ring.submit(
            *(blkif.Request(Operation.READ, 8 * n, buffer.segments(8)) for n, buffer in enumerate(buffers))
        )
        answers = {response.id: response.status for response in frontend.ring.wait(len(ids))}
        assert [answers[i] for i in ids] == [OKAY] * 4 + [ERROR] + [OKAY] * 4
        assert [buffer.read() for n, buffer in enumerate(buffers) if n != 4] == [
            expected(n, 1) for n in range(9) if n != 4
        ]
        assert served.device.statistics().borrowed == 0
        for buffer in buffers:
            buffer.close()


def test_what_fails_again_and_again_is_not_tried_any_more(machine: Machine, disk: str) -> None:
    domain = machine.domain(DOMAIN)
    with (
        tapfs.open(disk, writable=True) as image,
        Frontend(domain) as frontend,
        Served(machine, frontend, image) as served,
    ):
        buffer = frontend.buffer(LARGE)
        page = buffer.pages[0]
        for failures, borrowed in ((7, 1), (8, 1)):
            domain.set_grant(buffer.references[0], 0)
            for _ in range(failures):
                assert frontend.ring.call(blkif.Request(Operation.READ, 0, buffer.segments(LARGE * 8))).status == ERROR
            domain.set_grant(buffer.references[0], page << 2 | 1)
            assert frontend.ring.call(blkif.Request(Operation.READ, 0, buffer.segments(LARGE * 8))).status == OKAY
            assert buffer.read() == expected(0, LARGE)
            assert served.device.statistics().borrowed == borrowed
        buffer.close()
