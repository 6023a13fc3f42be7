"""A simulated Xen host for each test: a machine directory, its xenstored in this process, and the environment."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio

import tapfs
from tapfs.xen.host import MACHINE_VARIABLE, Host, find_host
from tapfs.xen.xenstore.client import XenStore, connect
from tests.xen.disk_device import DISK_BYTES, Devices
from tests.xen.machine import Machine
from tests.xen.supervising import GUEST, SIZE
from tests.xen.supervisor_process import SupervisorProcess
from tests.xen.xenstored import Xenstored


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """A simulated machine whose directory is in TAPFS_XEN_MACHINE; TAPFS_RUNTIME_DIR is a folder in it.

    Its path is short: that of a socket has 107 bytes at most.
    """
    with tempfile.TemporaryDirectory(prefix="xen-") as name, Machine(Path(name)) as made:
        monkeypatch.setenv(MACHINE_VARIABLE, name)
        monkeypatch.setenv("TAPFS_RUNTIME_DIR", f"{name}/run")
        yield made


@pytest.fixture
def host(machine: Machine) -> Host:
    """What tapfs makes of the environment."""
    return find_host()


@pytest.fixture
async def xenstored(machine: Machine, nursery: trio.Nursery) -> Xenstored:
    """The machine's xenstored, in this process; it has domain 0 only (`introduce` makes more)."""
    store = Xenstored(machine.directory)
    await nursery.start(store.run)
    return store


@pytest.fixture
async def devices(machine: Machine, xenstored: Xenstored, host: Host) -> AsyncIterator[Devices]:
    """Devices with a process each, without a supervisor; the processes are killed at the end."""
    async with connect(host) as store:
        await store.read("/local")  # the server has seen us
        made = Devices(machine, xenstored, store)
        try:
            yield made
        finally:
            made.close()


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A raw disk of zeros."""
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(DISK_BYTES))
    return path


@pytest.fixture
def qcow(tmp_path: Path) -> Path:
    """An empty qcow disk."""
    path = tmp_path / "disk.qcow"
    tapfs.create(str(path), "qcow", DISK_BYTES)
    return path


@pytest.fixture
def supervisor(machine: Machine) -> Iterator[SupervisorProcess]:
    """The machine's supervisor, to be started; it and its disk processes are killed at the end."""
    with SupervisorProcess(machine.directory) as process:
        yield process


@pytest.fixture
async def store(host: Host, xenstored: Xenstored) -> AsyncIterator[XenStore]:
    """Domain 0's view of xenstore, with a guest in it."""
    xenstored.introduce(GUEST, "guest")
    async with connect(host) as store:
        yield store


@pytest.fixture
async def supervised(store: XenStore, supervisor: SupervisorProcess) -> SupervisorProcess:
    """The supervisor, ready."""
    await trio.to_thread.run_sync(supervisor.start)
    return supervisor


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A raw image of zeros."""
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(SIZE))
    return path
