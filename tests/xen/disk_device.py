"""A device with the process that serves it, started here without a supervisor, and the guest that uses it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

import tapfs
from tapfs import ErrorKind, Image, ImageError
from tapfs.serving.runtime_directory import make_private, runtime_directory
from tapfs.xen.device import OUR_KIND, Device, State, parse_state, parse_vdev
from tapfs.xen.host import MACHINE_SOCKET, Host
from tapfs.xen.supervisor.claim import claim
from tapfs.xen.supervisor.device_model_door import open_door, start_keeper
from tapfs.xen.toolstack.attach import attach, detach, remove_device
from tapfs.xen.toolstack.control_client import ask
from tapfs.xen.xenstore.client import XenStore, connect
from tests.conftest import REPOSITORY
from tests.xen import libxl
from tests.xen.machine import PATIENCE, Machine
from tests.xen.xenbus_frontend import XenbusFrontend
from tests.xen.xenstored import Xenstored, guest_socket

COMMAND = [sys.executable, "-m", "tapfs.xen.disk.process"]

DONE, FAILED, STOPPED = 0, 3, 75
#: Bytes of the disks `raw` and `qcow` (conftest.py).
DISK_BYTES = 4 << 20


class DiskDevice:
    """One device; `store` is domain 0's, `log` what its processes say."""

    def __init__(self, store: XenStore, device: Device, machine: Machine) -> None:
        self.store, self.device, self.machine = store, device, machine
        self.process: subprocess.Popen[bytes] | None = None
        self.log_path = machine.directory / f"{device.key}.log"

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def start(self) -> None:
        """Start the (next) process."""
        words = [*COMMAND, *(str(word) for word in self.device)]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                words, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    async def await_key(self, name: str, *values: str | None) -> str | None:
        """Wait until a key of the backend has one of these values; which."""
        with trio.fail_after(PATIENCE):
            async with self.store.watch(self.device.backend) as events:
                async for _ in events:
                    value = await self.read(name)
                    if value in values:
                        return value
        raise AssertionError("a watch has ended")

    async def await_ready(self) -> None:
        status = await self.await_key("tapfs/status", "ready", "failed")
        assert status == "ready", self.log

    async def await_log(self, text: str) -> None:
        """Wait until the process has said something."""
        with trio.fail_after(PATIENCE):
            while text not in self.log:
                await trio.sleep(0.01)

    async def ended(self) -> int:
        """The exit code, once the process has ended."""
        process = self.process
        assert process is not None
        with trio.fail_after(PATIENCE):
            while process.poll() is None:
                await trio.sleep(0.01)
        return process.returncode

    async def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        await self.ended()

    async def terminate(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return await self.ended()

    async def ask(self, command: str, **arguments: object) -> dict[str, object]:
        return await ask(self.device, command, **arguments)

    async def read(self, name: str) -> str | None:
        return await self.store.read(f"{self.device.backend}/{name}")

    async def state(self) -> State:
        return parse_state(await self.read("state"))

    async def detach(self) -> None:
        """What `tapfs detach` does; the guest has to close meanwhile."""
        await detach(self.store, self.device, seconds=PATIENCE)

    async def remove(self) -> None:
        await remove_device(self.store, self.device)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
        if self.process is not None:
            self.process.wait()


class Devices:
    """Makes devices on a simulated machine, and the guests' connections to their xenstore."""

    def __init__(self, machine: Machine, xenstored: Xenstored, store: XenStore) -> None:
        self._machine, self._xenstored, self.store = machine, xenstored, store
        #: The test's own connections to xenstored.
        self.connections = set(xenstored.connections)
        self.all: list[DiskDevice] = []
        self._keepers: list[subprocess.Popen[bytes]] = []

    async def attach(
        self,
        params: str | Path,
        mode: str = "w",
        *,
        domain: int = 1,
        vdev: str = "xvda",
        kind: str = OUR_KIND,
        **options: str | int,
    ) -> DiskDevice:
        """A claimed device whose process has been started; it may not be ready yet."""
        if domain not in self._xenstored.domains:
            self._xenstored.introduce(domain)
        device = Device(kind, domain, parse_vdev(vdev))
        keys = {name.replace("_", "-"): value for name, value in options.items()}
        if kind == OUR_KIND:
            await attach(self.store, device, params=str(params), mode=mode, options=keys)
        else:
            await libxl.add_disk(self.store, device, str(params), mode, **keys)
        await claim(self.store, device, simulated=True)
        made = DiskDevice(self.store, device, self._machine)
        self.all.append(made)
        if device.made_by_libxl:
            self._keep_door(device)
        made.start()
        return made

    def _keep_door(self, device: Device) -> None:
        """Have a keeper for device models at once; the supervisor starts one for the first of them."""
        make_private(runtime_directory())
        make_private(self.runtime_directory)
        door = open_door(device, self.runtime_directory)
        assert door is not None
        listener, held = door
        self._keepers.append(start_keeper(device, self.runtime_directory, listener, held))
        listener.close()
        os.close(held)

    async def serve(self, params: str | Path, mode: str = "w", **options: str | int) -> DiskDevice:
        """The same, with the image open."""
        made = await self.attach(params, mode, **options)
        await made.await_ready()
        return made

    @asynccontextmanager
    async def guest(self, disk: DiskDevice, **options: object) -> AsyncGenerator[XenbusFrontend]:
        """The driver in the guest, not connected yet; it has the rights of its domain."""
        number = disk.device.domain
        socket = guest_socket(self._machine.directory, number)
        async with connect(Host(str(socket), str(self._machine.directory))) as store:
            yield XenbusFrontend(store, self._machine.domain(number), disk.device, **options)

    async def lose_xenstored(self) -> None:
        """Cut the processes off from xenstored; they may connect again."""
        for connection in self._xenstored.connections - self.connections:
            if connection.domain == 0:
                await connection.stream.aclose()

    def refuse_connections(self, *, refuse: bool = True) -> None:
        """Have xenstored out of reach, or in reach again, for whoever connects from now on."""
        socket = self._machine.directory / MACHINE_SOCKET
        away = socket.with_suffix(".away")
        (socket if refuse else away).rename(away if refuse else socket)

    async def await_socket(self, disk: DiskDevice) -> None:
        """Wait until the process of a disk takes commands."""
        with trio.fail_after(PATIENCE):
            while True:
                try:
                    await disk.ask("status")
                except ImageError:
                    await trio.sleep(0.01)
                else:
                    return

    @property
    def runtime_directory(self) -> Path:
        """Where the processes have their sockets and journals."""
        return self._machine.directory / "run" / "xen"

    def close(self) -> None:
        for disk in self.all:
            disk.close()
        for keeper in self._keepers:
            keeper.kill()
            keeper.wait()


def descriptors_of(pid: int) -> int:
    """How many descriptors a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


async def opened_when_free(path: Path, format_name: str) -> Image:
    """An image for writing; the kernel may take a moment to let go of what a killed process had open."""
    with trio.fail_after(PATIENCE):
        while True:
            try:
                return tapfs.open(path, format=format_name, writable=True)
            except ImageError as error:
                if error.kind is not ErrorKind.LOCKED:
                    raise
            await trio.sleep(0.01)
