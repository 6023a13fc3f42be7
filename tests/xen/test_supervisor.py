"""The supervisor: a real one, with real disk processes, over a simulated machine whose xenstored runs in the test."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import trio

import tapfs
from tapfs.errors import ErrorKind, ImageError
from tapfs.xen import runtime_files
from tapfs.xen.device import State
from tapfs.xen.host import Host
from tapfs.xen.image_stamp import GivenUp
from tapfs.xen.supervisor.disk_starter import DiskStarter
from tapfs.xen.supervisor.restarts import Restarts
from tapfs.xen.supervisor.supervised_device import SupervisedDevice
from tapfs.xen.toolstack import attach as toolstack
from tapfs.xen.xenstore.client import Store, XenStore, connect
from tests.xen import libxl
from tests.xen.disk_device import opened_when_free
from tests.xen.machine import Machine
from tests.xen.supervising import (
    GUEST,
    SIZE,
    another_process,
    attach,
    disk,
    eventually,
    files_of,
    guest_disk,
    is_gone,
    pid_of,
)
from tests.xen.supervisor_process import PATIENCE, SupervisorProcess
from tests.xen.xenstore_tree import Change, RefusedError, Tree
from tests.xen.xenstored import Xenstored, guest_socket


async def test_several_disks_come_and_go(
    store: XenStore, supervised: SupervisorProcess, xenstored: Xenstored, tmp_path: Path
) -> None:
    devices = [disk("xvda"), disk("xvdb"), disk("xvda", domain=0)]
    async with trio.open_nursery() as nursery:
        for device in devices:
            path = tmp_path / f"{device.key}.raw"
            path.write_bytes(bytes(SIZE))
            nursery.start_soon(attach, store, device, path)
    pids = {await pid_of(store, device) for device in devices}
    assert pids == set(supervised.disk_processes().values())
    assert len(pids) == 3
    for pid in pids:
        assert os.getsid(pid) == pid != supervised.pid
        # Their equal pages may be merged, where the kernel does that.
        assert " mg" in Path(f"/proc/{pid}/smaps").read_text() or not Path("/sys/kernel/mm/ksm").exists()
    for device in devices:
        await toolstack.detach(store, device, seconds=PATIENCE)
        assert is_gone(xenstored, device)
        await eventually(lambda device=device: files_of(device) == [])
    await eventually(lambda: supervised.disk_processes() == {})
    assert xenstored.read("/local/domain/0/backend/tap") is None


async def test_what_is_offered(store: XenStore, supervised: SupervisorProcess, image: Path) -> None:
    await attach(store, disk(), image)
    offered = {
        name: await store.read(f"{disk().backend}/{name}")
        for name in (
            "max-ring-page-order",
            "feature-max-indirect-segments",
            "feature-flush-cache",
            "feature-persistent",
            "feature-barrier",
            "multi-queue-max-queues",
        )
    }
    assert offered == {
        "max-ring-page-order": "4",
        "feature-max-indirect-segments": "256",
        "feature-flush-cache": "1",
        "feature-persistent": "0",
        "feature-barrier": "1",
        "multi-queue-max-queues": str(min(os.cpu_count() or 1, 4)),
    }


async def test_a_disk_attached_before_the_supervisor_is_served(
    store: XenStore, supervisor: SupervisorProcess, image: Path
) -> None:
    await toolstack.attach(store, disk(), params=f"tap:sync:{image}", mode="w")
    await trio.to_thread.run_sync(supervisor.start)
    with trio.fail_after(PATIENCE):
        await toolstack.wait_ready(store, disk())


async def test_an_image_that_cannot_be_opened(
    store: XenStore, supervised: SupervisorProcess, xenstored: Xenstored, tmp_path: Path
) -> None:
    with pytest.raises(ImageError, match=r"missing\.raw") as caught:
        await attach(store, disk(), tmp_path / "missing.raw")
    assert caught.value.kind is ErrorKind.NOT_FOUND
    await eventually(lambda: is_gone(xenstored, disk()) and supervised.disk_processes() == {})
    await eventually(lambda: files_of(disk()) == [])


async def test_a_disk_of_libxl_is_served_and_its_failure_can_be_closed(
    store: XenStore, supervised: SupervisorProcess, xenstored: Xenstored, image: Path
) -> None:
    good, bad, other = (disk(name, kind="vbd") for name in ("xvda", "xvdb", "xvdc"))
    await libxl.add_disk(store, other, str(image), script="/etc/xen/scripts/block")
    await libxl.add_disk(store, bad, "tap:qcow:/nonexistent")
    await libxl.add_disk(store, good, f"tap:sync:{image}")
    await eventually(lambda: xenstored.read(f"{good.backend}/tapfs/status") == "ready")
    await eventually(lambda: xenstored.read(f"{bad.backend}/tapfs/status") == "failed")
    assert xenstored.read(f"{good.backend}/state") == "2"
    assert xenstored.read(f"{other.backend}/state") == "1"
    assert "xvdc" not in supervised.log.read_text()
    await store.write(f"{bad.backend}/online", 0)
    await store.write(f"{bad.backend}/state", State.CLOSING)
    await eventually(lambda: xenstored.read(f"{bad.backend}/state") == "6")
    await store.write(f"{good.backend}/online", 0)
    await store.write(f"{good.backend}/state", State.CLOSING)
    await eventually(lambda: xenstored.read(f"{good.backend}/state") == "6")
    # libxl removes its directories itself.
    assert xenstored.read(f"{good.backend}/online") == "0"


async def test_a_state_five_that_comes_after_the_process_is_done_is_answered(
    store: XenStore, supervised: SupervisorProcess, xenstored: Xenstored, image: Path
) -> None:
    device = disk(kind="vbd")
    await libxl.add_disk(store, device, f"tap:sync:{image}")
    await eventually(lambda: xenstored.read(f"{device.backend}/tapfs/status") == "ready")
    await store.write(f"{device.backend}/online", 0)
    await eventually(lambda: xenstored.read(f"{device.backend}/state") == "6" and supervised.disk_processes() == {})
    await store.write(f"{device.backend}/state", State.CLOSING)
    await eventually(lambda: xenstored.read(f"{device.backend}/state") == "6")
    assert supervised.disk_processes() == {}
    # Kept after all: it is served again.
    await store.write(f"{device.backend}/online", 1)
    await eventually(lambda: xenstored.read(f"{device.backend}/state") == "2" and len(supervised.disk_processes()) == 1)


async def test_a_crashed_process_is_started_again(store: XenStore, supervised: SupervisorProcess, image: Path) -> None:
    await attach(store, disk(), image)
    for number in (signal.SIGKILL, signal.SIGTERM):
        before = await pid_of(store, disk())
        os.kill(before, number)

        await another_process(store, disk(), before)
        await eventually(lambda: len(supervised.disk_processes()) == 1)
    assert "by SIGKILL; starting it again" in supervised.log.read_text()
    assert "domain 3 xvda (guest): " in supervised.log.read_text()


async def test_a_process_that_crashes_all_the_time_is_given_up(
    store: XenStore,
    supervisor: SupervisorProcess,
    xenstored: Xenstored,
    image: Path,
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await toolstack.attach(store, disk(), params=f"tap:sync:{image}", mode="w")
    runtime_files.directory().mkdir(parents=True)
    slept: list[float] = []
    sleep = trio.sleep

    async def noted_sleep(seconds: float) -> None:
        slept.append(seconds)
        await sleep(seconds)

    monkeypatch.setattr(trio, "sleep", noted_sleep)
    supervised = SupervisedDevice(
        disk(),
        store,
        runtime_files.directory(),
        machine=str(runtime_files.directory()),
        starter=DiskStarter(),
        restarts=Restarts(most=3, first_pause=0.0123),
    )
    nursery.start_soon(supervised.run)
    killed: set[int] = set()
    while xenstored.read(f"{disk().backend}/tapfs/status") != "failed":
        process = supervised.process
        if process is not None and process.pid not in killed:
            process.send(signal.SIGSEGV)
            killed.add(process.pid)
        await trio.sleep(0.01)
    assert len(killed) == 3
    assert 0.0123 in slept
    assert xenstored.read(f"{disk().backend}/state") == "5"
    assert xenstored.read(f"{disk().backend}/tapfs/error") == (
        "its process ended 3 times within a minute, the last time by SIGSEGV"
    )
    # The guest lets go; then nothing is left.
    await store.write(f"{disk().backend}/online", 0)
    supervised.news()
    await eventually(lambda: is_gone(xenstored, disk()))
    assert supervisor.disk_processes() == {}


async def test_a_guest_is_told_that_its_disk_is_given_up(
    store: XenStore, supervised: SupervisorProcess, machine: Machine, xenstored: Xenstored, image: Path
) -> None:
    """Its process cannot open the image any more, so nobody else would tell it."""
    await attach(store, disk(), image)
    async with guest_disk(machine, disk()):
        image.unlink()
        os.kill(await pid_of(store, disk()), signal.SIGKILL)
        await eventually(lambda: xenstored.read(f"{disk().backend}/tapfs/status") == "failed")
        await eventually(lambda: xenstored.read(f"{disk().backend}/state") == "5")


async def test_a_killed_supervisor_takes_nothing_with_it(
    store: XenStore, supervised: SupervisorProcess, xenstored: Xenstored, image: Path
) -> None:
    await attach(store, disk(), image)
    pid = await pid_of(store, disk())
    supervised.end(signal.SIGKILL)
    assert supervised.disk_processes() == {f"tap {GUEST} {disk().number}": pid}
    await trio.to_thread.run_sync(supervised.start)
    await trio.sleep(0.1)
    assert supervised.disk_processes() == {f"tap {GUEST} {disk().number}": pid}
    # It is watched like one of its own.
    os.kill(pid, signal.SIGKILL)

    await another_process(store, disk(), pid)
    await eventually(lambda: len(supervised.disk_processes()) == 1)
    with trio.fail_after(PATIENCE):
        await toolstack.detach(store, disk(), seconds=PATIENCE)
    await eventually(lambda: supervised.disk_processes() == {})
    assert is_gone(xenstored, disk())


async def test_disks_are_forked_from_one_process_and_need_it_no_more(
    store: XenStore, supervised: SupervisorProcess, image: Path, tmp_path: Path
) -> None:
    await attach(store, disk(), image)
    first = await pid_of(store, disk())
    children = Path(f"/proc/{supervised.pid}/task/{supervised.pid}/children").read_text().split()
    (forked,) = [int(pid) for pid in children if b"fork_server" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    # It has arguments of its own, and memory of the other's.
    assert str(first) in children
    words = Path(f"/proc/{first}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
    assert words[-5:] == [b"tapfs.xen.disk.process", b"tap", b"3", b"51712", b"0"]
    assert Path(f"/proc/{first}/smaps_rollup").read_text().split("Shared_Dirty:")[1].split()[0] > "0"
    os.kill(forked, signal.SIGKILL)
    other = tmp_path / "other.raw"
    other.write_bytes(bytes(SIZE))
    await attach(store, disk("xvdb"), other)
    assert supervised.disk_processes().keys() == {"tap 3 51712", "tap 3 51728"}
    assert "each loads all now" in supervised.log.read_text()
    os.kill(first, signal.SIGKILL)
    await another_process(store, disk(), first)
    await eventually(lambda: len(supervised.disk_processes()) == 2)


async def test_a_process_that_nobody_knows_yet_is_waited_for(
    store: XenStore, supervised: SupervisorProcess, image: Path
) -> None:
    await attach(store, disk(), image)
    pid = await pid_of(store, disk())
    name = await store.read(f"{disk().backend}/tapfs/process")
    assert name is not None
    supervised.end(signal.SIGKILL)
    await store.remove(f"{disk().backend}/tapfs/process")  # as if it had been killed before it could write that
    await trio.to_thread.run_sync(supervised.start)
    await trio.sleep(0.2)
    assert list(supervised.disk_processes().values()) == [pid]
    await store.write(f"{disk().backend}/tapfs/process", name)
    await eventually(lambda: f"process {pid} at work" in supervised.log.read_text())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_stopped_supervisor_stops_all_and_the_next_goes_on(
    store: XenStore, supervised: SupervisorProcess, xenstored: Xenstored, image: Path, number: signal.Signals
) -> None:
    await attach(store, disk(), image)
    assert await trio.to_thread.run_sync(supervised.end, number) == 0
    assert supervised.disk_processes() == {}
    assert xenstored.read(f"{disk().backend}/state") == "2"
    await trio.to_thread.run_sync(supervised.start)
    await eventually(lambda: len(supervised.disk_processes()) == 1)


async def test_what_xenstored_refuses_for_one_disk_is_tried_again_and_leaves_the_others(
    store: XenStore,
    supervised: SupervisorProcess,
    image: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The keys of a driver domain's disks are counted, and there is a quota."""
    write = Tree.write
    refused, other = disk("xvdb"), tmp_path / "other.raw"
    other.write_bytes(bytes(SIZE))

    def refuse(tree: Tree, domain: int, path: str, value: bytes) -> Change:
        if path == f"{refused.backend}/tapfs/status":
            raise RefusedError("EQUOTA")
        return write(tree, domain, path, value)

    async with trio.open_nursery() as nursery:
        with monkeypatch.context() as full:
            full.setattr(Tree, "write", refuse)
            nursery.start_soon(attach, store, refused, other)
            await eventually(lambda: "xenstore's quota is used up" in supervised.log.read_text())
            await attach(store, disk(), image)
    assert set(supervised.disk_processes()) == {f"tap {GUEST} {each.number}" for each in (disk(), refused)}


async def test_a_hangup_does_nothing(store: XenStore, supervised: SupervisorProcess, image: Path) -> None:
    supervised.send(signal.SIGHUP)
    await attach(store, disk(), image)
    assert len(supervised.disk_processes()) == 1


async def test_the_disks_of_a_domain_that_is_gone_are_removed(
    store: XenStore, supervised: SupervisorProcess, xenstored: Xenstored, image: Path
) -> None:
    await attach(store, disk(), image)
    xenstored.destroy(GUEST)
    await eventually(lambda: is_gone(xenstored, disk()) and supervised.disk_processes() == {})
    await eventually(lambda: files_of(disk()) == [])


async def test_what_is_left_of_a_domain_that_went_meanwhile_is_removed(
    store: XenStore, supervised: SupervisorProcess, xenstored: Xenstored, image: Path
) -> None:
    await attach(store, disk(), image)
    await trio.to_thread.run_sync(supervised.end)
    xenstored.destroy(GUEST)
    (runtime_files.directory() / "77-51712.journal").write_bytes(b"of a guest before the restart of the host")
    await trio.to_thread.run_sync(supervised.start)
    await eventually(lambda: is_gone(xenstored, disk()) and files_of(disk()) == [])
    assert not (runtime_files.directory() / "77-51712.journal").exists()
    assert supervised.disk_processes() == {}


async def test_there_is_one_supervisor(supervised: SupervisorProcess) -> None:
    second = supervised.spawn()
    assert await trio.to_thread.run_sync(second.wait, PATIENCE) == 15
    assert f"supervised already, by process {supervised.pid}; " in supervised.log.read_text()


async def test_without_xenstored_it_says_so_and_leaves_the_disks(
    host: Host, machine: Machine, supervisor: SupervisorProcess, image: Path
) -> None:
    async with trio.open_nursery() as nursery:
        xenstored = Xenstored(machine.directory)
        await nursery.start(xenstored.run)
        xenstored.introduce(GUEST)
        await trio.to_thread.run_sync(supervisor.start)
        async with connect(host) as store:
            await attach(store, disk(), image)
        supervisor.log.write_text("")
        nursery.cancel_scope.cancel()
    assert await trio.to_thread.run_sync(supervisor.wait) == 10
    assert "xenstored is gone" in supervisor.log.read_text()
    assert "Traceback" not in supervisor.log.read_text()


async def test_a_device_made_anew_at_once_is_served_anew(
    store: XenStore, supervised: SupervisorProcess, image: Path
) -> None:
    await attach(store, disk(), image)
    before = await pid_of(store, disk())
    second = image.with_name("second.raw")
    second.write_bytes(bytes(SIZE))

    async def replace(keys: Store) -> None:
        await keys.remove(disk().backend)
        for name, value in {"params": f"tap:sync:{second}", "mode": "w", "online": 1, "state": 1}.items():
            await keys.write(f"{disk().backend}/{name}", value)

    await store.transact(replace)  # no process can see that it was gone
    with trio.fail_after(PATIENCE):
        await toolstack.wait_ready(store, disk())
    assert await pid_of(store, disk()) != before
    assert str(second) in supervised.log.read_text()
    assert "starting it again" not in supervised.log.read_text()


async def test_a_device_that_becomes_another_backends_is_left_alone(
    store: XenStore, supervised: SupervisorProcess, xenstored: Xenstored, image: Path
) -> None:
    device = disk(kind="vbd")
    await libxl.add_disk(store, device, "tap:qcow:/nonexistent")
    await eventually(lambda: xenstored.read(f"{device.backend}/tapfs/status") == "failed")

    async def replace(keys: Store) -> None:
        await keys.remove(device.backend)
        await keys.write(f"{device.backend}/script", "block")
        await keys.write(f"{device.backend}/state", 1)

    await store.transact(replace)
    await eventually(lambda: "xvda (guest): gone" in supervised.log.read_text())
    assert xenstored.read(f"{device.backend}/state") == "1"
    assert xenstored.read(f"{device.backend}/tapfs/status") is None


async def test_what_failed_is_tried_again_by_the_next_supervisor(
    store: XenStore, supervised: SupervisorProcess, xenstored: Xenstored, tmp_path: Path
) -> None:
    late = tmp_path / "late.raw"
    await toolstack.attach(store, disk(), params=f"tap:sync:{late}", mode="w")
    await eventually(lambda: xenstored.read(f"{disk().backend}/tapfs/status") == "failed")
    late.write_bytes(bytes(SIZE))
    await trio.to_thread.run_sync(supervised.end)
    await trio.to_thread.run_sync(supervised.start)
    await eventually(lambda: xenstored.read(f"{disk().backend}/tapfs/status") == "ready")


async def test_the_guest_does_not_read_what_is_noted_beside_libxls_keys(
    store: XenStore, supervised: SupervisorProcess, machine: Machine, image: Path, xenstored: Xenstored
) -> None:
    device = disk(kind="vbd")
    await libxl.add_disk(store, device, f"tap:sync:{image}")
    await eventually(lambda: xenstored.read(f"{device.backend}/tapfs/status") == "ready")
    async with connect(Host(str(guest_socket(machine.directory, GUEST)), str(machine.directory))) as own:
        assert await own.read(f"{device.backend}/state") == "2"
        for name in ("process", "token", "status"):
            with pytest.raises(ImageError, match="Permission denied"):
                await own.read(f"{device.backend}/tapfs/{name}")
    assert supervised.disk_processes()


@pytest.mark.parametrize("changed", [False, True])
async def test_what_a_disk_that_was_given_up_left(
    store: XenStore,
    supervised: SupervisorProcess,
    machine: Machine,
    xenstored: Xenstored,
    tmp_path: Path,
    nursery: trio.Nursery,
    *,
    changed: bool,
) -> None:
    """The next one takes it up, unless another program has changed the image since."""
    path = tmp_path / "disk.qcow"
    tapfs.create(str(path), "qcow", SIZE)
    await trio.to_thread.run_sync(supervised.end)
    await toolstack.attach(store, disk(), params=f"tap:qcow:{path}", mode="w")
    with trio.CancelScope() as scope:
        ours = SupervisedDevice(
            disk(),
            store,
            runtime_files.directory(),
            machine=str(runtime_files.directory()),
            starter=DiskStarter(),
            restarts=Restarts(most=1),
        )
        nursery.start_soon(ours.run)
        async with guest_disk(machine, disk()) as guest:
            await trio.to_thread.run_sync(guest.frontend.write, 0, b"a" * 512)
            os.kill(await pid_of(store, disk()), signal.SIGKILL)
            await eventually(lambda: xenstored.read(f"{disk().backend}/tapfs/status") == "failed")
        scope.cancel()
    names = [f"{disk().key}.{suffix}" for suffix in ("journal", "left", "plan")]
    assert set(names) <= set(files_of(disk()))
    if changed:
        with await opened_when_free(path, "qcow") as image:
            image.write(0, b"b" * 512)
            image.write(SIZE // 2, b"c" * 4096)
    given_up = GivenUp(runtime_files.directory(), disk().key)
    standing = given_up.take(str(path))
    assert standing is not None
    assert [(runtime_files.directory() / name).exists() for name in names] == [not changed, False, not changed]
    given_up.write(standing)
    await trio.to_thread.run_sync(supervised.start)
    await eventually(lambda: xenstored.read(f"{disk().backend}/tapfs/status") == "ready")
    await trio.to_thread.run_sync(supervised.end)
    with tapfs.open(path, format="qcow") as image:
        assert image.read(0, 512) == (b"b" if changed else b"a") * 512
    assert tapfs.check(path).corruptions == 0


async def test_what_xentop_reads_goes_with_its_process(
    store: XenStore, supervised: SupervisorProcess, machine: Machine, image: Path
) -> None:
    device = disk(kind="vbd3")
    await libxl.add_disk(store, device, f"tap:sync:{image}")
    with trio.fail_after(PATIENCE):
        await toolstack.wait_ready(store, device)
    pid = await pid_of(store, device)
    folder = machine.directory / f"td3-{pid}"
    assert await store.read(f"{device.backend}/kthread-pid") == str(pid)
    await eventually((folder / f"vbd-{device.domain}-{device.number}").exists)
    os.kill(pid, signal.SIGKILL)
    await another_process(store, device, pid)
    assert not folder.exists()
    await trio.to_thread.run_sync(supervised.end)
    assert not list(machine.directory.glob("td3-*"))
