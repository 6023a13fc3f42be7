"""`tapfs attach` and `detach`: the keys that they write, who may read these, and the states that they wait for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator

import pytest
import trio
import trio.testing

from tapfs.errors import ErrorKind, ImageError
from tapfs.serving.processes import process_start
from tapfs.xen.device import Device, State
from tapfs.xen.host import Host
from tapfs.xen.toolstack import attach as toolstack
from tapfs.xen.toolstack.attach import attach, attach_and_wait, detach, remove_device, wait_connected, wait_ready
from tapfs.xen.xenstore.client import Store, XenStore, connect
from tests.xen.xenstored import Xenstored, guest_socket

DISK = Device("tap", 3, 51712)
PARAMS = "tap:qcow:/images/x.qcow"
PATIENCE = 30.0


@pytest.fixture
async def store(xenstored: Xenstored, host: Host) -> AsyncIterator[XenStore]:
    """Domain 0's connection, with a guest that is domain 3."""
    xenstored.introduce(3, "mail")
    async with connect(host) as connected:
        yield connected


@pytest.fixture
async def guest(store: XenStore, xenstored: Xenstored) -> AsyncIterator[XenStore]:
    """The connection of domain 3."""
    async with connect(Host(str(guest_socket(xenstored.directory, 3)))) as connected:
        yield connected


@pytest.fixture
def living() -> str:
    """`tapfs/process` of a process that runs: this one."""
    return f"{os.getpid()}:{process_start(os.getpid())}"


async def keys_below(store: Store, path: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in await store.list(path):
        below = await keys_below(store, f"{path}/{name}")
        found |= {f"{name}/{key}": value for key, value in below.items()}
        if not below:
            found[name] = await store.read(f"{path}/{name}") or ""
    return found


async def wait_for(store: XenStore, path: str, value: str | None) -> None:
    with trio.fail_after(PATIENCE):
        async with store.watch(path) as events:
            while await store.read(path) != value:
                await anext(events)


@pytest.fixture
def ending() -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends when it is given a line."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.communicate()


# -- attach


async def test_attach_writes_both_directories(store: XenStore) -> None:
    await attach(store, DISK, params=PARAMS, mode="w!", options={"limit-bytes": 1 << 20, "format": "qcow"})
    assert await keys_below(store, DISK.backend) == {
        "frontend": "/local/domain/3/device/vbd/51712",
        "frontend-id": "3",
        "params": PARAMS,
        "mode": "w!",
        "dev": "xvda",
        "device-type": "disk",
        "online": "1",
        "removable": "0",
        "bootable": "1",
        "state": "1",
        "tapfs/limit-bytes": "1048576",
        "tapfs/format": "qcow",
    }
    assert await keys_below(store, DISK.frontend) == {
        "backend": "/local/domain/0/backend/tap/3/51712",
        "backend-id": "0",
        "virtual-device": "51712",
        "device-type": "disk",
        "state": "1",
    }


async def test_the_guest_reads_its_backend_and_writes_its_frontend(
    store: XenStore, guest: XenStore, xenstored: Xenstored, host: Host
) -> None:
    await attach(store, DISK, params=PARAMS, mode="w", options={"nice": 5})
    await store.write(f"{DISK.backend}/sectors", 8)
    backend = await guest.read("device/vbd/51712/backend")
    assert backend == DISK.backend
    assert [await guest.read(f"{backend}/{key}") for key in ("state", "sectors", "mode")] == ["1", "8", "w"]
    for key in ("state", "sectors", "params", "new"):
        with pytest.raises(ImageError, match="Permission denied"):
            await guest.write(f"{backend}/{key}", 4)
    with pytest.raises(ImageError, match="Permission denied"):
        await guest.remove(backend)
    # What runs here is not its business.
    with pytest.raises(ImageError, match="Permission denied"):
        await guest.read(f"{backend}/tapfs/nice")
    for key, value in {"state": "3", "ring-ref": "8", "event-channel": "1"}.items():
        await guest.write(f"device/vbd/51712/{key}", value)
        assert await store.read(f"{DISK.frontend}/{key}") == value
    # Another guest sees nothing of it.
    xenstored.introduce(4)
    async with connect(Host(str(guest_socket(xenstored.directory, 4)))) as other:
        for path in (f"{backend}/state", f"{DISK.frontend}/state"):
            with pytest.raises(ImageError, match="Permission denied"):
                await other.read(path)


async def test_all_of_it_appears_at_one_moment(store: XenStore, xenstored: Xenstored) -> None:
    async with store.watch("/local/domain/0/backend/tap") as events:
        await anext(events)
        await attach(store, DISK, params=PARAMS, mode="w")
        await anext(events)
        assert xenstored.read(f"{DISK.backend}/state") == "1"
        assert xenstored.read(f"{DISK.frontend}/state") == "1"


async def test_a_disk_that_is_there_is_not_attached_again(store: XenStore) -> None:
    await attach(store, DISK, params=PARAMS, mode="w")
    with pytest.raises(ImageError, match="domain 3 has a disk xvda already; detach it first") as raised:
        await attach(store, DISK, params="other", mode="w")
    assert raised.value.kind is ErrorKind.EXISTS
    assert await store.read(f"{DISK.backend}/params") == PARAMS
    made_by_xl = Device("vbd", 3, 51728)
    await store.write(f"{made_by_xl.backend}/params", "x")
    await store.write(f"{made_by_xl.frontend}/backend", made_by_xl.backend)
    with pytest.raises(ImageError, match="domain 3 has a disk xvdb already"):
        await attach(store, Device("tap", 3, 51728), params=PARAMS, mode="w")
    assert await store.read(made_by_xl.frontend + "/backend") == made_by_xl.backend


async def test_what_a_disk_left_in_the_frontend_is_replaced(store: XenStore) -> None:
    await store.write(f"{DISK.frontend}/backend", "/local/domain/0/backend/vbd/3/51712")
    await store.write(f"{DISK.frontend}/ring-ref", 8)
    await attach(store, DISK, params=PARAMS, mode="r")
    assert await store.read(f"{DISK.frontend}/ring-ref") is None
    assert await store.read(f"{DISK.frontend}/backend") == DISK.backend


async def test_no_such_domain(store: XenStore) -> None:
    with pytest.raises(ImageError, match="there is no domain 7") as raised:
        await attach(store, Device("tap", 7, 51712), params=PARAMS, mode="w")
    assert raised.value.kind is ErrorKind.NOT_FOUND
    assert await store.read("/local/domain/7") is None


async def test_domain_0_takes_disks_too(store: XenStore) -> None:
    disk = Device("tap", 0, 51712)
    await attach(store, disk, params=PARAMS, mode="w")
    assert await store.read(f"{disk.frontend}/backend") == disk.backend
    await detach(store, disk, seconds=PATIENCE)
    assert await store.list("/local/domain/0/device/vbd") == []


# -- waiting


async def test_attach_waits_until_the_image_is_open(store: XenStore, nursery: trio.Nursery) -> None:
    async def serve() -> None:
        await wait_for(store, f"{DISK.backend}/state", "1")
        await store.write(f"{DISK.backend}/tapfs/status", "starting")
        await trio.testing.wait_all_tasks_blocked()
        await store.write(f"{DISK.backend}/tapfs/status", "ready")

    nursery.start_soon(serve)
    await attach_and_wait(store, DISK, params=PARAMS, mode="w")
    assert await store.read(f"{DISK.backend}/tapfs/status") == "ready"


async def test_the_disk_s_error_is_the_command_s(store: XenStore, nursery: trio.Nursery) -> None:
    async def fail() -> None:
        await wait_for(store, f"{DISK.backend}/state", "1")
        await store.write(f"{DISK.backend}/tapfs/error-kind", "locked")
        await store.write(f"{DISK.backend}/tapfs/error", "/images/x.qcow: is in use by process 17")
        await store.write(f"{DISK.backend}/tapfs/status", "failed")

    nursery.start_soon(fail)
    with pytest.raises(ImageError, match=r"^/images/x.qcow: is in use by process 17$") as raised:
        await attach_and_wait(store, DISK, params=PARAMS, mode="w")
    assert raised.value.kind is ErrorKind.LOCKED
    assert await store.read(DISK.backend) is None
    assert await store.read(DISK.frontend) is None


@pytest.mark.parametrize("kind", [None, "nonsense"])
async def test_an_error_without_a_kind(store: XenStore, kind: str | None) -> None:
    await attach(store, DISK, params=PARAMS, mode="w")
    if kind:
        await store.write(f"{DISK.backend}/tapfs/error-kind", kind)
    await store.write(f"{DISK.backend}/tapfs/status", "failed")
    with pytest.raises(ImageError, match="domain 3 xvda cannot be served") as raised:
        await wait_ready(store, DISK)
    assert raised.value.kind is ErrorKind.IO


async def test_without_a_supervisor_nothing_is_left(store: XenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolstack, "_CLAIM_SECONDS", 0.05)
    with pytest.raises(ImageError, match="nobody serves domain 3 xvda; start `tapfs blktapctrl`") as raised:
        await attach_and_wait(store, DISK, params=PARAMS, mode="w")
    assert raised.value.kind is ErrorKind.NOT_FOUND
    assert await store.list("/local/domain/0/backend") == []
    assert await store.read(DISK.frontend) is None


async def test_a_cancelled_attach_leaves_nothing(store: XenStore) -> None:
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as tasks:

            async def attach_it() -> None:
                await attach_and_wait(store, DISK, params=PARAMS, mode="w")

            tasks.start_soon(attach_it)
            await wait_for(store, f"{DISK.backend}/state", "1")
            scope.cancel()
    assert await store.list("/local/domain/0/backend") == []
    assert await store.read(DISK.frontend) is None


async def test_an_image_that_takes_too_long(store: XenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolstack, "_READY_SECONDS", 0.05)
    await attach(store, DISK, params=PARAMS, mode="w")
    await store.write(f"{DISK.backend}/tapfs/status", "starting")
    with pytest.raises(ImageError, match="domain 3 xvda is not ready after"):
        await wait_ready(store, DISK)


async def test_a_disk_that_goes_while_it_is_waited_for(store: XenStore, nursery: trio.Nursery) -> None:
    await attach(store, DISK, params=PARAMS, mode="w")
    nursery.start_soon(remove_device, store, DISK)
    with pytest.raises(ImageError, match="domain 3 xvda was removed meanwhile"):
        await wait_ready(store, DISK)


async def test_waiting_for_the_guest(store: XenStore, nursery: trio.Nursery) -> None:
    await attach(store, DISK, params=PARAMS, mode="w")
    await store.write(f"{DISK.frontend}/state", 3)
    with pytest.raises(
        ImageError, match=r"has not taken up domain 3 xvda in 0.05 .*frontend is initialised \(state 3\)"
    ):
        await wait_connected(store, DISK, seconds=0.05)
    nursery.start_soon(store.write, f"{DISK.backend}/state", State.CONNECTED)
    await wait_connected(store, DISK, seconds=PATIENCE)
    nursery.start_soon(store.remove, DISK.backend)
    await store.write(f"{DISK.backend}/state", 2)
    with pytest.raises(ImageError, match="was removed meanwhile"):
        await wait_connected(store, DISK, seconds=PATIENCE)


# -- detach


async def connected_disk(store: XenStore, process: str) -> None:
    await attach(store, DISK, params=PARAMS, mode="w")
    await store.write(f"{DISK.backend}/tapfs/process", process)
    await store.write(f"{DISK.backend}/tapfs/status", "ready")
    for path in (DISK.backend, DISK.frontend):
        await store.write(f"{path}/state", State.CONNECTED)


async def test_detach_waits_for_both_sides(
    store: XenStore, nursery: trio.Nursery, ending: subprocess.Popen[bytes]
) -> None:
    await connected_disk(store, f"{ending.pid}:{process_start(ending.pid)}")
    steps: list[str] = []
    detached = trio.Event()

    async def close() -> None:
        await wait_for(store, f"{DISK.backend}/state", "5")
        steps.append(f"online {await store.read(f'{DISK.backend}/online')}")
        await store.write(f"{DISK.frontend}/state", 6)
        await trio.testing.wait_all_tasks_blocked(0.02)
        # The guest is done, the disk's process is not: it still writes.
        steps.append("closing" if await store.read(DISK.backend) is not None else "gone")
        await store.write(f"{DISK.backend}/state", 6)
        await wait_for(store, DISK.backend, None)
        steps.append("detached" if detached.is_set() else "ending")
        ending.communicate(b"\n")

    nursery.start_soon(close)
    await detach(store, DISK, seconds=PATIENCE)
    detached.set()
    assert steps == ["online 0", "closing", "ending"]
    assert await store.list("/local/domain/0/backend") == []
    assert await store.read(DISK.frontend) is None


async def test_a_disk_in_use_is_kept_and_may_be_detached_later(
    store: XenStore, living: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toolstack, "_END_SECONDS", 0.01)
    await connected_disk(store, living)
    with pytest.raises(
        ImageError,
        match=r"still in use by the guest after 0.05 seconds: its frontend is connected \(state 4\); unmount",
    ) as raised:
        await detach(store, DISK, seconds=0.05)
    assert raised.value.kind is ErrorKind.LOCKED
    assert await store.read(f"{DISK.backend}/state") == "5"
    for path in (DISK.frontend, DISK.backend):
        await store.write(f"{path}/state", 6)
    await detach(store, DISK, seconds=PATIENCE)
    assert await store.read(DISK.backend) is None


async def test_a_crash_of_the_disk_s_process_is_no_close(store: XenStore) -> None:
    """What the guest has asked for and what has been taken up of it is the next process's."""
    await connected_disk(store, "1:1")
    with pytest.raises(ImageError, match="still in use by the guest"):
        await detach(store, DISK, seconds=0.05)
    assert await store.read(f"{DISK.backend}/state") == "5"


async def test_force_takes_the_disk_from_the_guest(
    store: XenStore, living: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toolstack, "_END_SECONDS", 0.01)
    await connected_disk(store, living)
    await detach(store, DISK, seconds=0.05, force=True)
    assert await store.list("/local/domain/0/backend") == []
    assert await store.read(DISK.frontend) is None


@pytest.mark.parametrize("process", [None, "1:1", "999999999:5", "junk"])
async def test_nobody_need_close_what_nobody_serves(store: XenStore, process: str | None) -> None:
    await attach(store, DISK, params=PARAMS, mode="w")
    if process is not None:
        await store.write(f"{DISK.backend}/tapfs/process", process)
    await detach(store, DISK, seconds=PATIENCE)
    assert await store.read(DISK.backend) is None


async def test_a_guest_that_is_gone_holds_nothing(store: XenStore, xenstored: Xenstored) -> None:
    await connected_disk(store, "1:1")
    xenstored.destroy(3)
    await detach(store, DISK, seconds=PATIENCE)
    assert await store.list("/local/domain/0/backend") == []


async def test_only_what_is_there_and_ours_is_detached(store: XenStore) -> None:
    with pytest.raises(ImageError, match="domain 3 has no disk xvda") as raised:
        await detach(store, DISK, seconds=1)
    assert raised.value.kind is ErrorKind.NOT_FOUND
    assert await store.list("/local/domain/0/backend") == []
    by_xl = Device("vbd", 3, 51712)
    await store.write(f"{by_xl.backend}/state", 4)
    with pytest.raises(ImageError, match="domain 3 xvda was attached by xl; use `xl block-detach 3 xvda`") as raised:
        await detach(store, by_xl, seconds=1)
    assert raised.value.kind is ErrorKind.UNSUPPORTED
    assert await store.read(f"{by_xl.backend}/state") == "4"


async def test_removing_one_disk_leaves_the_others(store: XenStore) -> None:
    second, of_xl = Device("tap", 3, 51728), Device("vbd", 3, 51712)
    await attach(store, DISK, params=PARAMS, mode="w")
    await attach(store, second, params=PARAMS, mode="w")
    # The number is now another's.
    await store.write(f"{DISK.frontend}/backend", of_xl.backend)
    await remove_device(store, DISK)
    assert await store.list("/local/domain/0/backend/tap/3") == ["51728"]
    assert await store.read(f"{DISK.frontend}/backend") == of_xl.backend
    await remove_device(store, second)
    assert await store.list("/local/domain/0/backend") == []
    assert await store.read(second.frontend) is None
