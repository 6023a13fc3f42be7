"""A guest under load sees only a pause of crashes, restarts and the end of the supervisor."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import trio

import tapfs
from tapfs.xen.device import State
from tapfs.xen.xenstore.client import XenStore
from tests.xen.load import Load
from tests.xen.machine import Machine
from tests.xen.supervising import (
    SIZE,
    another_process,
    attach,
    detach,
    disk,
    eventually,
    files_of,
    guest_disk,
    is_gone,
    pid_of,
)
from tests.xen.supervisor_process import SupervisorProcess
from tests.xen.xenstored import Xenstored


async def more(load: Load, count: int = 20) -> None:
    """Wait until so many more writes have been answered, or one has failed."""
    before = load.count
    await eventually(lambda: load.failed or load.count >= before + count)
    load.check()


@pytest.fixture
def qcow(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow"
    tapfs.create(str(path), "qcow", SIZE)
    return path


def contents(path: Path, image_format: str) -> bytes:
    with tapfs.open(path, format=image_format) as image:
        return image.read(0, SIZE)


async def test_a_crash_is_a_pause(
    machine: Machine, store: XenStore, supervised: SupervisorProcess, xenstored: Xenstored, qcow: Path
) -> None:
    await attach(store, disk(), qcow, image_format="qcow")
    async with guest_disk(machine, disk()) as driver:
        async with Load(driver.frontend, SIZE) as load:
            await more(load)
            for _ in range(2):
                before = await pid_of(store, disk())
                os.kill(before, signal.SIGKILL)
                await another_process(store, disk(), before)
                await more(load)
        await detach(store, driver)
    assert is_gone(xenstored, disk())
    assert contents(qcow, "qcow") == load.expected()
    assert tapfs.check(qcow).corruptions == 0
    assert await trio.to_thread.run_sync(supervised.end) == 0


async def test_the_supervisor_may_be_killed_under_load(
    machine: Machine, store: XenStore, supervised: SupervisorProcess, image: Path
) -> None:
    await attach(store, disk(), image)
    async with guest_disk(machine, disk()) as driver:
        async with Load(driver.frontend, SIZE) as load:
            await more(load)
            pid = await pid_of(store, disk())
            supervised.end(signal.SIGKILL)
            await more(load)
            await trio.to_thread.run_sync(supervised.start)
            await more(load)
            assert list(supervised.disk_processes().values()) == [pid]
        await detach(store, driver)
    assert contents(image, "raw") == load.expected()
    await eventually(lambda: files_of(disk()) == [])


async def test_the_end_of_the_supervisor_is_a_pause(
    machine: Machine, store: XenStore, supervised: SupervisorProcess, xenstored: Xenstored, qcow: Path
) -> None:
    await attach(store, disk(), qcow, image_format="qcow")
    async with guest_disk(machine, disk()) as driver:
        async with Load(driver.frontend, SIZE) as load:
            await more(load)
            assert await trio.to_thread.run_sync(supervised.end) == 0
            assert supervised.disk_processes() == {}
            assert xenstored.read(f"{disk().backend}/state") == str(State.CONNECTED)
            # Nobody has it open: whoever asks may look at it.
            contents(qcow, "qcow")
            await trio.to_thread.run_sync(supervised.start)
            await more(load)
        await detach(store, driver)
    assert contents(qcow, "qcow") == load.expected()


async def test_the_crash_of_one_disk_is_no_pause_for_another(
    machine: Machine, store: XenStore, supervised: SupervisorProcess, tmp_path: Path
) -> None:
    devices = [disk("xvda"), disk("xvdb")]
    for device in devices:
        (tmp_path / device.name).write_bytes(bytes(SIZE))
        await attach(store, device, tmp_path / device.name)
    async with guest_disk(machine, devices[0]) as first, guest_disk(machine, devices[1]) as second:
        process = await pid_of(store, devices[0])
        os.kill(process, signal.SIGSTOP)  # it hangs
        async with Load(second.frontend, SIZE) as load:
            await more(load)
            os.kill(process, signal.SIGKILL)
            await another_process(store, devices[0], process)
            await more(load)
        for driver in (first, second):
            await detach(store, driver)
    assert contents(tmp_path / "xvdb", "raw") == load.expected()


async def test_a_domain_that_goes_under_load_leaves_nothing(
    machine: Machine, store: XenStore, supervised: SupervisorProcess, xenstored: Xenstored, image: Path
) -> None:
    await attach(store, disk(), image)
    async with guest_disk(machine, disk()) as driver:
        async with Load(driver.frontend, SIZE) as load:
            await more(load)
        xenstored.destroy(disk().domain)
        await eventually(lambda: is_gone(xenstored, disk()) and supervised.disk_processes() == {})
        await eventually(lambda: files_of(disk()) == [])
    assert contents(image, "raw") == load.expected()
