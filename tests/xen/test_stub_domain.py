"""A guest and its stub domain at one image: two devices of two domains, one process."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

import tapfs
from tapfs.xen.device import Device, State, parse_state, parse_vdev
from tapfs.xen.toolstack.attach import wait_ready
from tapfs.xen.toolstack.control_client import ask
from tapfs.xen.xenstore.client import XenStore
from tests.xen import libxl
from tests.xen.machine import Machine
from tests.xen.supervising import GUEST, SIZE, another_process, eventually, files_of, guest_disk, pid_of
from tests.xen.supervisor_process import PATIENCE, SupervisorProcess
from tests.xen.xenbus_frontend import XenbusFrontend
from tests.xen.xenstored import Xenstored

STUB = 4
NUMBER = parse_vdev("xvda")
DISK, STUB_DISK = Device("vbd", GUEST, NUMBER), Device("vbd", STUB, NUMBER)
#: Sectors that each writes.
BY_GUEST, BY_STUB = b"guest   " * 1024, b"stub    " * 1024


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An empty qcow."""
    path = tmp_path / "disk.qcow"
    tapfs.create(str(path), "qcow", SIZE)
    return path


@pytest.fixture
async def both(store: XenStore, supervised: SupervisorProcess, xenstored: Xenstored, image: Path) -> XenStore:
    """What libxl writes for a guest that has a stub domain, first its own disk; both are ready."""
    xenstored.introduce(STUB, "guest-dm")
    xenstored.write(f"/local/domain/{STUB}/target", str(GUEST))
    for device in (DISK, STUB_DISK):
        await libxl.add_disk(store, device, f"tap:qcow:{image}")
    for device in (DISK, STUB_DISK):
        await wait_ready(store, device)
    return store


@asynccontextmanager
async def drivers(machine: Machine) -> AsyncIterator[tuple[XenbusFrontend, XenbusFrontend]]:
    """The stub domain's driver connects before the guest's."""
    async with guest_disk(machine, STUB_DISK) as stub, guest_disk(machine, DISK) as guest:
        yield stub, guest


async def write(driver: XenbusFrontend, sector: int, data: bytes) -> None:
    await trio.to_thread.run_sync(driver.frontend.write, sector, data)


async def read(driver: XenbusFrontend, sector: int, length: int) -> bytes:
    return await trio.to_thread.run_sync(driver.frontend.read, sector, length // 512)


async def remove(store: XenStore, driver: XenbusFrontend) -> None:
    """What `xl destroy` and the end of a driver come to."""
    await libxl.ask_for_removal(store, driver.device)
    await driver.close_when_told()
    await eventually(partial(is_closed, store, driver.device))
    await libxl.remove_disk(store, driver.device)
    await eventually(lambda: files_of(driver.device) == [])


async def is_closed(store: XenStore, device: Device) -> bool:
    return parse_state(await store.read(f"{device.backend}/state")) is State.CLOSED


async def test_what_one_writes_the_other_reads(
    both: XenStore, supervised: SupervisorProcess, machine: Machine, image: Path
) -> None:
    store = both
    async with drivers(machine) as (stub, guest):
        assert len(supervised.disk_processes()) == 1
        assert await pid_of(store, DISK) == await pid_of(store, STUB_DISK)
        await write(guest, 0, BY_GUEST)
        assert await read(stub, 0, len(BY_GUEST)) == BY_GUEST
        await write(stub, 8, BY_STUB)
        assert await read(guest, 0, len(BY_GUEST)) == BY_GUEST[:4096] + BY_STUB[: len(BY_GUEST) - 4096]
        # Each guest's flush is for what both have written: the file alone has it then.
        await write(guest, 256, BY_GUEST)
        await trio.to_thread.run_sync(stub.frontend.flush)
        await remove(store, stub)
        assert (await ask(DISK, "statistics"))["writes"] == 3
        await write(guest, 0, BY_GUEST)
        await remove(store, guest)
    await eventually(lambda: supervised.disk_processes() == {})
    assert tapfs.check(image, format="qcow").corruptions == 0
    with tapfs.open(image, format="qcow") as disk:
        assert disk.read(0, len(BY_GUEST)) == disk.read(256 * 512, len(BY_GUEST)) == BY_GUEST


async def test_both_outlive_their_process(both: XenStore, machine: Machine) -> None:
    store = both
    async with drivers(machine) as (stub, guest):
        for turn in range(2):
            await write(guest, 0, BY_GUEST)
            await write(stub, 64 + turn, BY_STUB)
            pid = await pid_of(store, DISK)
            os.kill(pid, signal.SIGKILL)
            async with trio.open_nursery() as nursery:  # both have requests in their rings meanwhile
                nursery.start_soon(write, guest, 512, BY_GUEST)
                nursery.start_soon(write, stub, 1024, BY_STUB)
            await another_process(store, STUB_DISK, pid)
            assert await read(stub, 512, len(BY_GUEST)) == BY_GUEST
            assert await read(guest, 64 + turn, len(BY_STUB)) == BY_STUB
            assert await read(guest, 1024, len(BY_STUB)) == BY_STUB


async def test_a_pause_holds_both(both: XenStore, machine: Machine, tmp_path: Path) -> None:
    del both
    async with drivers(machine) as (stub, guest):
        await ask(DISK, "pause")
        buffer = stub.frontend.buffer(1)
        message, _ = stub.frontend.message(0, 0, buffer.segments(8))
        stub.frontend.ring.submit(message)
        assert not stub.frontend.ring.responses()
        await ask(DISK, "resume")
        assert len(await trio.to_thread.run_sync(stub.frontend.ring.wait, 1)) == 1
        stub.frontend.put_back(buffer)
        await write(stub, 0, BY_STUB)
        await ask(DISK, "swap", file=str(tmp_path / "kept.qcow"))
        await write(guest, 0, BY_GUEST)
        assert await read(stub, 0, len(BY_GUEST)) == BY_GUEST
    with tapfs.open(tmp_path / "kept.qcow", format="qcow") as kept:
        assert kept.read(0, len(BY_STUB)) == BY_STUB


async def test_the_supervisor_is_replaced(both: XenStore, supervised: SupervisorProcess, machine: Machine) -> None:
    store = both
    async with drivers(machine) as (stub, guest):
        pid = await pid_of(store, DISK)
        supervised.end(signal.SIGKILL)
        await trio.to_thread.run_sync(supervised.start)
        await write(stub, 0, BY_STUB)
        assert await read(guest, 0, len(BY_STUB)) == BY_STUB
        assert list(supervised.disk_processes().values()) == [pid]
        await remove(store, stub)
        assert await read(guest, 0, len(BY_STUB)) == BY_STUB


async def test_whoever_asks_twice_at_once_for_a_stub_domain_gets_it_once(
    store: XenStore, supervised: SupervisorProcess, xenstored: Xenstored, image: Path
) -> None:
    xenstored.introduce(STUB, "guest-dm")
    await libxl.add_disk(store, DISK, f"tap:qcow:{image}")
    await wait_ready(store, DISK)
    await libxl.add_disk(store, STUB_DISK, f"tap:qcow:{image}", script="/etc/xen/scripts/of-the-test")
    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(partial(ask, DISK, "serve_stub", kind="vbd", domain=STUB, number=NUMBER))
    assert supervised.log.read_text().count("a stub domain uses the disk: ") == 1


async def test_a_guest_without_its_disk(
    store: XenStore, supervised: SupervisorProcess, xenstored: Xenstored, tmp_path: Path
) -> None:
    xenstored.introduce(STUB, "guest-dm")
    xenstored.write(f"/local/domain/{STUB}/target", str(GUEST))
    for device in (DISK, STUB_DISK):
        await libxl.add_disk(store, device, f"tap:qcow:{tmp_path}/missing.qcow")
    with trio.fail_after(PATIENCE):
        await eventually(partial(has_failed, store, STUB_DISK))
    assert await store.read(f"{STUB_DISK.backend}/tapfs/error") == f"the disk of its guest, {DISK}, is not served"


async def has_failed(store: XenStore, device: Device) -> bool:
    return await store.read(f"{device.backend}/tapfs/status") == "failed"
