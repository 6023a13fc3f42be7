"""A frontend that means harm, in dom0 by gntalloc: it gets errors, and nothing that is not its own; others go on."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from tapfs.xen.device import OUR_KIND, Device, State
from tapfs.xen.host import find_host
from tapfs.xen.xenstore.client import connect
from tests.laboratory.commands import attempt_tapfs, run, say, tapfs, wait_until
from tests.laboratory.scenario import scenario
from tests.xen.blkif import OKAY, PAGE, SECTOR, Discard, Indirect, Message, Operation, Request, Segment
from tests.xen.frontend import Frontend
from tests.xen.scenarios.contents import new_raw
from tests.xen.scenarios.dom0 import Dom0, disk_processes, read_store, vdev_number, xl_disk
from tests.xen.scenarios.granting_domain import GrantingDomain
from tests.xen.xenbus_frontend import XenbusFrontend

SECTORS = 2048
VDEV = "xvdh"
CANARY = b"\xa5" * PAGE
# A ring that is refused or broken ends like this.
GONE = (State.CLOSING, State.CLOSED, State.UNKNOWN)
_OWN_DRIVER = Path("/sys/module/xen_blkfront")


def _image() -> Path:
    image = new_raw("hostile.img", SECTORS * SECTOR >> 20)
    image.write_bytes(b"".join(b"%0511d\n" % sector for sector in range(SECTORS)))
    return image


def _as_frontend(
    dom0: Dom0, image: Path, work: Callable[[XenbusFrontend], Awaitable[None]], *, mode: str = "w", grants: str = "copy"
) -> None:
    """Attach the image to dom0 without dom0's own driver, which no other scenario here needs, and be its frontend."""
    if _OWN_DRIVER.exists():
        run("modprobe", "-r", _OWN_DRIVER.name)
    device = Device(OUR_KIND, 0, vdev_number(VDEV))
    dom0.attach_with_grants(f"tap:aio:{image}", VDEV, 0, grants, mode)
    domain = GrantingDomain()

    async def main() -> None:
        async with connect(find_host()) as store:
            persistent = grants == "persistent"
            await work(
                XenbusFrontend(store, domain, device, ring_pages=2, indirect_segments=64, persistent=persistent)  # type: ignore[arg-type]
            )

    try:
        trio.run(main)
        tapfs("detach", "--domain", "0", "--vdev", VDEV)
    except BaseException as error:
        say(f"as a frontend: {error!r}")
        attempt_tapfs("detach", "--domain", "0", "--vdev", VDEV, "--force")
        raise
    finally:
        domain.close()


def _must_fail(frontend: Frontend, message: Message, why: str) -> None:
    response = frontend.ring.call(message)
    assert response.status != OKAY, f"{why} was answered with success"


def _bad_requests(frontend: Frontend, domain: GrantingDomain) -> None:
    ring = frontend.ring
    page = domain.allocate()[0]
    reference = domain.grant(page)
    whole = Segment(reference)
    read, write = Operation.READ, Operation.WRITE
    domain.write_page(page, CANARY)
    wrong: list[tuple[str, Message]] = []
    for operation in (read, write, Operation.BARRIER):
        wrong += [
            (f"{operation.name} beyond the end", Request(operation, SECTORS, [whole])),
            (f"{operation.name} across the end", Request(operation, SECTORS - 1, [whole])),
            (f"{operation.name} at the largest sector", Request(operation, (1 << 64) - 1, [whole])),
            (f"{operation.name} at a sector whose byte wraps", Request(operation, 1 << 55, [whole])),
            (f"{operation.name} of a segment that ends first", Request(operation, 0, [Segment(reference, 5, 4)])),
            (f"{operation.name} beyond the page", Request(operation, 0, [Segment(reference, 0, 8)])),
            (f"{operation.name} far beyond the page", Request(operation, 0, [Segment(reference, 255, 255)])),
            (f"{operation.name} of too many segments", Request(operation, 0, [whole] * 11, count=12)),
            (f"{operation.name} of far too many segments", Request(operation, 0, [whole] * 11, count=255)),
            (f"{operation.name} of a reference that was never given", Request(operation, 0, [Segment(200_000)])),
            (f"{operation.name} of the largest reference", Request(operation, 0, [Segment((1 << 32) - 1)])),
            (f"{operation.name} of one good page and one bad", Request(operation, 0, [whole, Segment(200_000)])),
            (f"indirect {operation.name} of no segment", Indirect(operation, 0, 0, [reference])),
            (f"indirect {operation.name} of too many", Indirect(operation, 0, 60_000, [reference] * 8)),
            (f"indirect {operation.name} by a bad reference", Indirect(operation, 0, 20, [200_000])),
            (f"indirect {operation.name} of garbage", Indirect(operation, 0, 20, [reference])),
        ]
    wrong += [(f"operation {number}", Request(number, 0, [whole])) for number in (4, 7, 8, 128, 255)]
    wrong += [
        ("an indirect flush", Indirect(Operation.FLUSH, 0, 1, [reference])),
        ("an indirect indirect", Indirect(Operation.INDIRECT, 0, 1, [reference])),
        ("a discard beyond the end", Discard(SECTORS - 8, 16)),
        ("a discard that wraps", Discard((1 << 64) - 8, 16)),
        ("a discard of everything there is", Discard(0, (1 << 64) - 1)),
    ]
    for why, message in wrong:
        _must_fail(frontend, message, why)
        # A first good page may hold what it was to hold; nothing of the disk's end or beyond.
        if "one good page" not in why and "garbage" not in why:
            assert domain.read_page(page) == CANARY, f"{why} wrote to the page"
        domain.write_page(page, CANARY)
    taken_back = GrantingDomain(1, 0)
    (old,) = (taken_back.grant(page) for page in taken_back.allocate())
    taken_back.close()
    _must_fail(frontend, Request(read, 0, [Segment(old)]), "a read into a page that was taken back")
    _must_fail(frontend, Request(write, 0, [Segment(old)]), "a write from a page that was taken back")
    read_only = domain.allocate(readonly=True)[0]
    domain.write_page(read_only, CANARY)
    _must_fail(frontend, Request(read, 0, [Segment(domain.grant(read_only))]), "a read into a page granted for reading")
    assert domain.read_page(read_only) == CANARY
    say(f"{len(wrong) + 3} wrong requests had errors")
    assert ring.room == ring.entries


def _noise(frontend: Frontend) -> None:
    """Requests of random bytes, one ring full after the other. Their grants are most probably none."""
    numbers = random.Random(11)
    ring = frontend.ring
    for _ in range(12):
        for _ in range(ring.entries):
            raw = bytearray(numbers.randbytes(112))
            raw[0] = numbers.choice((0, 2, 5, 6, raw[0]))  # no writes: a lucky one would be a right one
            raw[1] = numbers.choice((0, 2, raw[1])) if raw[0] == Operation.INDIRECT else raw[1]
            ring.put_raw(bytes(raw))
        ring.push(always=True)
        wait_until("responses to noise", lambda: ring.rsp_prod == ring.produced % (1 << 32))
        ring.consumed = ring.produced


def _send_bad_requests(dom0: Dom0, grants: str) -> None:
    image = _image()
    before = image.read_bytes()

    async def work(bus: XenbusFrontend) -> None:
        frontend = await bus.connect()
        assert isinstance(bus.domain, GrantingDomain)
        process = dom0.disk_process(0, VDEV)
        assert frontend.read(0, SECTORS) == before
        await trio.to_thread.run_sync(_bad_requests, frontend, bus.domain)
        assert frontend.read(0, SECTORS) == before, "a wrong request changed the disk"
        frontend.write(100, b"right" * 1024)
        assert frontend.read(100, 10) == b"right" * 1024
        frontend.flush()
        # Discards of noise may hit the disk, by right.
        await trio.to_thread.run_sync(_noise, frontend)
        frontend.write(200, b"again" * 1024)
        assert frontend.read(200, 10) == b"again" * 1024
        assert dom0.disk_process(0, VDEV) == process, "the disk's process has died"
        await bus.close()

    _as_frontend(dom0, image, work, grants=grants)
    assert image.stat().st_size == SECTORS * SECTOR


@scenario(90)
def bad_requests_by_map(dom0: Dom0) -> None:
    _send_bad_requests(dom0, "map")


@scenario(90)
def bad_requests_by_persistent_grants(dom0: Dom0) -> None:
    _send_bad_requests(dom0, "persistent")


@scenario(90)
def read_only_disk(dom0: Dom0) -> None:
    image = _image()
    before = image.read_bytes()

    async def work(bus: XenbusFrontend) -> None:
        frontend = await bus.connect()
        reference = bus.domain.grant(bus.domain.allocate()[0])
        for operation in (Operation.WRITE, Operation.BARRIER):
            _must_fail(frontend, Request(operation, 0, [Segment(reference)]), f"a {operation.name} of a read-only disk")
            _must_fail(frontend, Indirect(operation, 0, 1, [reference]), f"an indirect {operation.name}")
        _must_fail(frontend, Discard(0, 8), "a discard of a read-only disk")
        assert frontend.read(0, SECTORS) == before
        await bus.close()

    _as_frontend(dom0, image, work, mode="r")
    assert image.read_bytes() == before


@scenario(120)
def broken_rings(dom0: Dom0) -> None:
    """Indices that cannot be, and a handshake of lies: the disk ends for this frontend, and can be had again."""
    image = _image()
    before = image.read_bytes()
    lies: list[dict[str, str | int | None]] = [
        {"ring-ref0": 200_000},
        {"ring-ref0": "nonsense"},
        {"ring-ref0": None, "ring-ref": None},
        {"ring-page-order": 9},
        {"ring-page-order": -1},
        {"event-channel": 4000},
        {"event-channel": None},
        {"protocol": "pdp11-abi"},
        {"multi-queue-num-queues": 1_000_000},
    ]

    async def work(bus: XenbusFrontend) -> None:
        for jump in (1, 1 << 31):
            frontend = await bus.connect()
            ring = frontend.ring
            ring.req_prod = ring.produced + ring.entries + jump
            ring.port.notify()
            say(f"indices jump by {jump}: {(await bus.await_backend(*GONE))!r}")
            await bus.close()
        for lie in lies:
            bus.wrong = lie
            await bus.publish()
            say(f"{lie}: {(await bus.await_backend(*GONE))!r}")
            await bus.close()
        bus.wrong = {"multi-queue-num-queues": None}  # the last lie is still there
        frontend = await bus.connect()
        assert frontend.read(0, SECTORS) == before
        await bus.close()

    _as_frontend(dom0, image, work)
    assert image.read_bytes() == before


@scenario(240)
def bad_requests(dom0: Dom0) -> None:
    """A guest works on its own disk all the while, served by its own process."""
    own = new_raw("own.img", 16)
    with dom0.guest("neighbour", "pv", (xl_disk(f"tap:aio:{own}", "xvda"),)) as guest:
        guest.wait_for_disk("xvda")
        process = dom0.disk_process(guest.domain, "xvda")
        guest.start_load("xvda", 4, 12)
        _send_bad_requests(dom0, "copy")
        guest.finish_load("xvda")
        assert dom0.disk_process(guest.domain, "xvda") == process
        assert disk_processes() == [process]
        assert read_store(f"{dom0.backend(guest.domain, 'xvda')}/state") == "4"
        guest.power_off()
