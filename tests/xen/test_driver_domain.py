"""A driver domain serves a guest's disk: the supervisor sees no more of xenstore than such a domain is shown."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio

from tapfs import ErrorKind, ImageError
from tapfs.xen.device import Device, parse_vdev
from tapfs.xen.host import Host
from tapfs.xen.toolstack import attach as toolstack
from tapfs.xen.toolstack import block_script
from tapfs.xen.xenstore.client import XenStore, connect
from tests.conftest import Ran
from tests.xen import libxl
from tests.xen.machine import Machine
from tests.xen.supervising import (
    GUEST,
    another_process,
    attach,
    detach,
    eventually,
    files_of,
    guest_disk,
    is_gone,
    pid_of,
)
from tests.xen.supervisor_process import PATIENCE, SupervisorProcess
from tests.xen.xenstore_tree import Change, RefusedError, Tree
from tests.xen.xenstored import Xenstored, guest_socket

DRIVER = 5
SECTORS = bytes(range(256)) * 4
#: What a process of the driver domain has in its environment.
SOCKET = "XENSTORED_PATH"


def disk_of(kind: str) -> Device:
    return Device(kind, GUEST, parse_vdev("xvda"), DRIVER)


@pytest.fixture
async def driver_domain(
    store: XenStore, xenstored: Xenstored, supervisor: SupervisorProcess, monkeypatch: pytest.MonkeyPatch
) -> SupervisorProcess:
    """The supervisor of a driver domain, ready; this process is domain 0."""
    xenstored.introduce(DRIVER, "storage", driver_domain=True)
    with monkeypatch.context() as environment:
        environment.setenv(SOCKET, str(guest_socket(supervisor.directory, DRIVER)))
        await trio.to_thread.run_sync(supervisor.start)
    return supervisor


@pytest.fixture
async def domain_0(
    driver_domain: SupervisorProcess, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[SupervisorProcess]:
    """The supervisor of domain 0, with files of its own, which shows the driver domain its guests."""
    with monkeypatch.context() as environment, SupervisorProcess(machine.directory, log="domain-0.log") as process:
        environment.setenv("TAPFS_RUNTIME_DIR", str(machine.directory / "run-0"))
        await trio.to_thread.run_sync(process.start)
        await eventually(lambda: f"domain {DRIVER} is a driver domain" in process.log.read_text())
        yield process


async def script(word: str, device: Device, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> int:
    """The block script, as `xl devd` runs it in the driver domain; its exit code."""
    with monkeypatch.context() as environment:
        environment.setenv(SOCKET, str(guest_socket(machine.directory, DRIVER)))
        environment.setenv("XENBUS_PATH", device.backend)
        environment.setattr("sys.argv", ["block-tapfs", word])
        with trio.fail_after(PATIENCE):
            return await trio.to_thread.run_sync(block_script.main)


async def test_a_disk_of_libxl(
    store: XenStore,
    driver_domain: SupervisorProcess,
    machine: Machine,
    xenstored: Xenstored,
    image: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = disk_of("vbd")
    await libxl.add_disk(store, device, f"tap:sync:{image}")
    assert await script("add", device, machine, monkeypatch) == 0
    assert xenstored.read(f"{device.backend}/hotplug-status") == "connected"
    async with guest_disk(machine, device) as driver:
        await trio.to_thread.run_sync(driver.frontend.write, 0, SECTORS)
        pid = await pid_of(store, device)
        os.kill(pid, signal.SIGKILL)
        await another_process(store, device, pid)
        assert await trio.to_thread.run_sync(driver.frontend.read, 0, 2) == SECTORS
        await libxl.ask_for_removal(store, device)
        await driver.close_when_told()
    # libxl in domain 0 removes the frontend's directory while the script still waits in the driver domain.
    await store.remove(device.frontend)
    assert await script("remove", device, machine, monkeypatch) == 0
    await libxl.remove_disk(store, device)
    await eventually(lambda: files_of(device) == [] and driver_domain.disk_processes() == {})


async def test_a_disk_that_domain_0_attaches(
    store: XenStore,
    driver_domain: SupervisorProcess,
    machine: Machine,
    xenstored: Xenstored,
    image: Path,
    tapfs_process: Callable[..., Ran],
) -> None:
    device = disk_of("tap")
    words = ("attach", f"tap:sync:{image}", "--domain", str(GUEST), "--vdev", "xvda", "--backend-domain", "storage")
    ran = await trio.to_thread.run_sync(tapfs_process, *words)
    assert ran.code == 0, ran.err
    assert xenstored.read(f"{device.frontend}/backend-id") == str(DRIVER)
    async with guest_disk(machine, device) as driver:
        await trio.to_thread.run_sync(driver.frontend.write, 2, SECTORS)
        asked = await trio.to_thread.run_sync(tapfs_process, "pause", "--domain", "guest", "--vdev", "xvda")
        assert f"domain {GUEST} xvda is served by domain {DRIVER}; run the command there" in asked.err
        await detach(store, driver)
    assert is_gone(xenstored, device)
    await eventually(lambda: driver_domain.disk_processes() == {})
    assert image.read_bytes()[1024:2048] == SECTORS


async def test_the_guest_is_destroyed(
    store: XenStore, driver_domain: SupervisorProcess, machine: Machine, xenstored: Xenstored, image: Path
) -> None:
    """Nobody tells a driver domain of it but the frontend's directory, which is gone."""
    device = disk_of("tap")
    await attach(store, device, image)
    async with guest_disk(machine, device):
        pass
    xenstored.destroy(GUEST)
    await eventually(lambda: is_gone(xenstored, device) and driver_domain.disk_processes() == {})


async def test_only_domain_0_attaches(store: XenStore, xenstored: Xenstored, machine: Machine, image: Path) -> None:
    xenstored.introduce(DRIVER, "storage")
    socket = guest_socket(machine.directory, DRIVER)
    async with connect(Host(str(socket), str(machine.directory))) as own:
        assert await own.own_domain() == DRIVER
        with pytest.raises(
            ImageError, match=rf"run tapfs attach in domain 0, with --backend-domain {DRIVER}"
        ) as raised:
            await toolstack.attach(own, disk_of("tap"), params=f"tap:sync:{image}", mode="w")
    assert raised.value.kind is ErrorKind.UNSUPPORTED
    assert is_gone(xenstored, disk_of("tap"))


async def test_a_domain_that_is_not_there(store: XenStore, image: Path) -> None:
    with pytest.raises(ImageError, match=f"there is no domain {DRIVER}"):
        await toolstack.attach(store, disk_of("tap"), params=f"tap:sync:{image}", mode="w")


async def add(
    store: XenStore, device: Device, params: str, uuid: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> int:
    """A disk of a virtual machine, as xl makes it; the exit code of the block script."""
    await libxl.name_machine(store, device.domain, uuid)
    await libxl.add_disk(store, device, params)
    return await script("add", device, machine, monkeypatch)


async def go_on(device: Device, machine: Machine) -> None:
    """The guest at the destination, which finds what the source has written."""
    async with guest_disk(machine, device) as guest:
        assert await trio.to_thread.run_sync(guest.frontend.read, 0, 2) == SECTORS


async def test_a_migration_waits_for_the_source_which_comes_to_rest(
    store: XenStore,
    domain_0: SupervisorProcess,
    driver_domain: SupervisorProcess,
    machine: Machine,
    xenstored: Xenstored,
    image: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Domain 0 shows the driver domain which machines they are, and that one is suspended."""
    source, destination, stranger = (disk_of("vbd")._replace(domain=domain) for domain in (GUEST, GUEST + 1, GUEST + 3))
    params = f"tap:sync:{image}"
    xenstored.introduce(destination.domain, "guest")
    xenstored.introduce(stranger.domain, "another")
    assert await add(store, source, params, "a", machine, monkeypatch) == 0
    async with guest_disk(machine, source) as guest:
        assert await add(store, destination, params, "a", machine, monkeypatch) == 0
        assert await add(store, stranger, params, "b", machine, monkeypatch) == 1
        await trio.to_thread.run_sync(guest.frontend.write, 0, SECTORS)
        await store.write(f"/local/domain/{GUEST}/control/shutdown", "suspend")
        xenstored.fire([Change("@releaseDomain")])
        await eventually(lambda: f"domain {GUEST} xvda (guest, a): at rest" in driver_domain.log.read_text())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(go_on, destination, machine)
        await eventually(lambda: "waiting: " in driver_domain.log.read_text())
        await libxl.ask_for_removal(store, source)
        await store.remove(source.frontend)
    shown = await store.permissions(f"/local/domain/{destination.domain}/vm")
    assert shown == ["n0", f"r{destination.domain}", f"r{DRIVER}"], "shown once, and to nobody else"


async def test_a_driver_domain_that_goes_is_forgotten(
    store: XenStore, domain_0: SupervisorProcess, xenstored: Xenstored
) -> None:
    xenstored.destroy(DRIVER)
    xenstored.introduce(DRIVER + 1, "another", driver_domain=True)
    await eventually(lambda: f"domain {DRIVER + 1} is a driver domain" in domain_0.log.read_text())
    assert xenstored.read(f"/local/domain/{DRIVER + 1}/tapfs-shows-guests") == "1"
    assert not [path for path in xenstored.tree.keys if path.startswith(f"/local/domain/{DRIVER}/")]


async def test_what_cannot_be_shown_leaves_domain_0s_own_disks_alone(
    store: XenStore, supervisor: SupervisorProcess, xenstored: Xenstored, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> Change:
        raise RefusedError("EINVAL")

    with monkeypatch.context() as refusing:
        await trio.to_thread.run_sync(supervisor.start)
        refusing.setattr(Tree, "set_permissions", refuse)
        xenstored.fire([xenstored.tree.make_directory(0, f"/local/domain/{DRIVER}/libxl"), Change("@introduceDomain")])
        await eventually(lambda: f"what domain {DRIVER} is to know" in supervisor.log.read_text())
    await attach(store, Device("tap", GUEST, parse_vdev("xvda")), image)
