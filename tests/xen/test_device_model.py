"""The device model of an HVM guest and the guest's own driver use one disk, the one before and beside the other."""

from __future__ import annotations

import errno
import socket
import subprocess
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import trio

import tapfs
from tests import nbd_client as nbd
from tests.xen import libxl
from tests.xen.boot_sector import COPY_SECTOR, SECTOR, TEXT_SECTOR, bootable
from tests.xen.disk_device import DISK_BYTES, DONE, STOPPED, Devices, DiskDevice
from tests.xen.machine import PATIENCE
from tests.xen.xenstored import Xenstored

PAGE = 4096
BOOTED, BY_DRIVER, LATER = (bytes([number]) * PAGE for number in (1, 2, 3))


@asynccontextmanager
async def device_model(device: DiskDevice) -> AsyncGenerator[nbd.Client]:
    """What QEMU does with the path that libxl gives it."""
    address = await device.read("physical-device-path")
    assert address is not None
    path = address if device.device.kind == "vbd3" else address.removeprefix("nbd+unix:///?socket=")
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(PATIENCE)
        connection.connect(path)
        client = nbd.Client(connection)
        await trio.to_thread.run_sync(client.go, "")
        yield client


async def ask(client: nbd.Client, command: int, offset: int = 0, length: int = 0, data: bytes = b"") -> nbd.Answer:
    return await trio.to_thread.run_sync(client.ask, command, offset, length, data)


async def read(client: nbd.Client, offset: int) -> bytes:
    return (await ask(client, nbd.READ, offset, PAGE)).whole()


async def write(client: nbd.Client, offset: int, data: bytes) -> None:
    assert (await ask(client, nbd.WRITE, offset, data=data)).error == 0


async def test_the_disk_boots_and_then_belongs_to_the_driver(devices: Devices, qcow: Path, tmp_path: Path) -> None:
    """Both write one image: neither sees an older map than the other, whatever is done to the disk meanwhile."""
    disk = await devices.serve(f"tap:qcow:{qcow}", kind="vbd")
    async with device_model(disk) as client:
        assert client.size == DISK_BYTES
        await write(client, 1 << 20, BOOTED)
        async with devices.guest(disk) as guest:
            frontend = await guest.connect()
            assert frontend.read((1 << 20) // SECTOR, PAGE // SECTOR) == BOOTED
            frontend.write((2 << 20) // SECTOR, BY_DRIVER)
            assert await read(client, 2 << 20) == BY_DRIVER
            await disk.ask("swap", file=str(tmp_path / "before.qcow2"))
            await write(client, 2 << 20, LATER)
            assert frontend.read((2 << 20) // SECTOR, PAGE // SECTOR) == LATER
            await guest.close()
        assert await read(client, 1 << 20) == BOOTED
        asked = (await disk.ask("metrics"))["operations"]
        assert [asked[kind]["bytes"] // PAGE for kind in ("read", "write")] == [4, 3]  # of both
        assert await disk.terminate() == STOPPED
        with tapfs.open(tmp_path / "before.qcow2") as kept, tapfs.open(qcow) as overlay:
            assert kept.read(2 << 20, PAGE) == BY_DRIVER
            assert overlay.read(2 << 20, PAGE) == LATER
        # The next process serves the same connection.
        disk.start()
        assert await read(client, 2 << 20) == LATER


async def test_a_device_model_does_not_see_the_end_of_the_process(devices: Devices, qcow: Path) -> None:
    """What has no answer is asked of the next process; nothing that was answered is lost."""
    disk = await devices.serve(f"tap:qcow:{qcow}", kind="vbd")
    async with device_model(disk) as client:
        await write(client, 0, BOOTED)
        for turn in range(1, 4):
            asked = [client.send(nbd.WRITE, (turn * 16 + page) * PAGE, data=bytes([turn]) * PAGE) for page in range(8)]
            await disk.kill()
            asked += [client.send(nbd.READ, 0, PAGE), client.send(nbd.FLUSH)]
            disk.start()
            for cookie in asked[:8]:
                assert (await trio.to_thread.run_sync(client.answer, cookie)).error == 0
            answer = await trio.to_thread.run_sync(lambda cookie=asked[8]: client.answer(cookie, 0, reads=True))
            assert answer.whole() == BOOTED
            assert (await trio.to_thread.run_sync(client.answer, asked[9])).error == 0
        for turn in range(1, 4):
            assert await read(client, (turn * 16 + 7) * PAGE) == bytes([turn]) * PAGE
    await disk.await_log("no device model uses the disk any more")
    # The supervisor removes the socket when the device is gone, and so the keeper ends.
    keepers = keepers_of(devices.runtime_directory)
    assert len(keepers) == 1
    (devices.runtime_directory / "1-51712.nbd").unlink()
    with trio.fail_after(PATIENCE):
        while keepers_of(devices.runtime_directory):
            await trio.sleep(0.05)


def keepers_of(directory: Path) -> list[str]:
    """The keepers of device models in a runtime directory, but those that have ended."""
    found: list[str] = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if b"tapfs.xen.supervisor.device_model_keeper" in words and str(directory).encode() in words:
                found.append(process.name)
    return found


async def test_qemu_does_not_see_the_end_of_the_process(devices: Devices, qcow: Path) -> None:
    """QEMU speaks with structured replies, and without a delay for reconnections, as by libxl's line."""
    disk = await devices.serve(f"tap:qcow:{qcow}", kind="vbd")
    path = await disk.read("physical-device-path")
    command = ["qemu-io", "-f", "raw", "-t", "writeback", path or ""]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as qemu:
        assert qemu.stdin is not None
        assert qemu.stdout is not None
        for number in range(1, 4):
            qemu.stdin.write(f"write -P {number} {number}M 256k\n")
            await disk.await_log("a device model uses the disk")
            await disk.kill()
            qemu.stdin.write(f"read -P {number} {number}M 256k\nflush\n")
            disk.start()
        qemu.stdin.write("quit\n")
        said, _ = await trio.to_thread.run_sync(qemu.communicate)
    assert said.count("262144/262144 bytes") == 6, said
    assert "failed" not in said, said


async def test_a_pause_holds_the_device_model_back(devices: Devices, raw: Path) -> None:
    disk = await devices.serve(f"tap:aio:{raw}", kind="vbd3")
    assert await disk.read("physical-device-path") == str(devices.runtime_directory / "1-51712.nbd")
    async with device_model(disk) as client:
        await write(client, 0, BOOTED)
        await disk.ask("pause")
        client.send(nbd.WRITE, 0, data=LATER)
        flushed = client.send(nbd.FLUSH)
        await disk.ask("status")
        assert raw.read_bytes()[:PAGE] == BOOTED
        await disk.ask("resume")
        assert (await trio.to_thread.run_sync(client.answer, flushed)).error == 0
        assert raw.read_bytes()[:PAGE] == LATER


async def test_a_disk_that_is_only_read_refuses_the_writes_of_a_device_model(devices: Devices, raw: Path) -> None:
    disk = await devices.serve(f"tap:aio:{raw}", "r", kind="vbd")
    async with device_model(disk) as client:
        assert await read(client, 1 << 20) == bytes(PAGE)
        assert (await ask(client, nbd.WRITE, 0, data=BOOTED)).error == errno.EPERM


async def test_an_incoming_guest_reads_nothing_stale_by_its_device_model(
    devices: Devices, xenstored: Xenstored, qcow: Path
) -> None:
    """QEMU looks at the first sector before the guest runs; what comes after it waits for the source to end."""
    source = await devices.serve(f"tap:qcow:{qcow}", domain=1, kind="vbd")
    xenstored.introduce(2, "guest")
    for domain in (1, 2):
        await libxl.name_machine(devices.store, domain, "a")
    destination = await devices.serve(f"tap:qcow:{qcow}", domain=2, kind="vbd")
    async with device_model(destination) as client:
        assert await read(client, 0) == bytes(PAGE)
        async with devices.guest(source) as guest:
            (await guest.connect()).write((1 << 20) // SECTOR, BY_DRIVER)
        cookie = client.send(nbd.READ, 1 << 20, PAGE)
        await destination.await_log("waiting: ")
        await libxl.ask_for_removal(devices.store, source.device)
        await devices.store.remove(source.device.frontend)
        assert await source.ended() == DONE
        answer = await trio.to_thread.run_sync(lambda: client.answer(cookie, 1 << 20, reads=True))
        assert answer.whole() == BY_DRIVER


async def test_qemu_boots_from_the_disk_by_the_line_of_libxl(devices: Devices, tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bootable(DISK_BYTES, "booted from tapfs\n"))
    served = await devices.serve(f"tap:sync:{disk}", kind="vbd")
    path = await served.read("physical-device-path")
    # As libxl__build_device_model_args_new and qemu_disk_ide_drive_string write it.
    drive = f"file={path},if=ide,index=0,media=disk,format=raw,cache=writeback"
    serial = tmp_path / "serial"
    command = ["qemu-system-i386", "-nodefaults", "-display", "none", "-m", "16", "-serial", f"file:{serial}"]
    with subprocess.Popen([*command, "-drive", drive], stdin=subprocess.DEVNULL) as qemu:
        try:
            with trio.fail_after(PATIENCE):
                while not any(disk.read_bytes()[COPY_SECTOR * SECTOR :][:SECTOR]):
                    assert qemu.poll() is None
                    await trio.sleep(0.05)
        finally:
            qemu.kill()
    contents = disk.read_bytes()
    assert contents[COPY_SECTOR * SECTOR :][:SECTOR] == contents[TEXT_SECTOR * SECTOR :][:SECTOR]
    assert serial.read_bytes() == b"booted from tapfs\n"
    await served.await_log("no device model uses the disk any more")
