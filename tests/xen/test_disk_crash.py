"""kill -9 of the process of a disk under load: the guest only sees a pause, and nothing it was told is lost."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest
import trio

import tapfs
from tapfs.xen.device import State
from tests.xen.disk_device import DONE, STOPPED, Devices, opened_when_free
from tests.xen.frontend import Frontend, Ring
from tests.xen.machine import PATIENCE

SIZE = 8 << 20
QUEUES = 3
STRIPE = SIZE // 512 // QUEUES


class Writer:
    """A thread of a guest that writes its stripe at random, many requests at once, and never asks for a flush."""

    def __init__(self, frontend: Frontend, ring: Ring, number: int) -> None:
        self._frontend, self._ring, self._first = frontend, ring, number * STRIPE
        self._random = random.Random(number)
        self._ending = threading.Event()
        self.thread = threading.Thread(target=self._run)
        self.content = bytearray(STRIPE * 512)
        self.count = 0
        self.error: BaseException | None = None

    def _run(self) -> None:
        try:
            while not self._ending.is_set():
                sector = self._random.randrange(STRIPE)
                data = self._random.randbytes(512) * min(self._random.choice((1, 3, 8, 200)), STRIPE - sector)
                self._frontend.write(self._first + sector, data, ring=self._ring)
                self.content[sector * 512 : sector * 512 + len(data)] = data
                self.count += 1
        except BaseException as error:  # noqa: BLE001  shown by the test's own thread
            self.error = error

    def end(self) -> None:
        self._ending.set()


def check(writers: list[Writer]) -> None:
    for writer in writers:
        if writer.error is not None:
            raise writer.error


async def progress(writers: list[Writer], count: int) -> None:
    """Wait until each has had so many more writes acknowledged."""
    wanted = [writer.count + count for writer in writers]
    with trio.fail_after(PATIENCE):
        while any(writer.count < least for writer, least in zip(writers, wanted, strict=True)):
            check(writers)
            await trio.sleep(0.005)


#: Kind: the format, the format of its parent, if it is over one, and how it is made.
KINDS: dict[str, tuple[str, str | None, dict[str, str]]] = {
    "raw": ("raw", None, {}),
    "qcow": ("qcow", None, {}),
    "overlay": ("qcow", "raw", {}),
    "vhd": ("vhd", None, {}),
    "differencing vhd": ("vhd", "raw", {}),
    "vmdk": ("vmdk", None, {}),
    "vmdk of two files": ("vmdk", None, {"subformat": "vmfsSparse"}),
    "delta vmdk": ("vmdk", "vmdk", {"zeroed_grain": "on"}),
    "vhdx": ("vhdx", None, {}),
    "differencing vhdx": ("vhdx", "vhdx", {}),
}


@pytest.mark.parametrize("kind", KINDS)
async def test_killed_again_and_again_under_load(devices: Devices, tmp_path: Path, kind: str) -> None:
    base, path = tmp_path / "base.raw", tmp_path / "disk"
    base.write_bytes(random.Random(7).randbytes(SIZE))
    format_name, over, options = KINDS[kind]
    below = base if over in {None, "raw"} else tmp_path / f"base.{over}"
    if below != base:
        tapfs.convert(base, below, format="raw", target_format=over)
    if kind == "raw":
        path.write_bytes(base.read_bytes())
    else:
        tapfs.create(
            str(path), format_name, SIZE, backing=str(below) if over else None, backing_format=over, options=options
        )
    disk = await devices.serve(f"tap:{format_name}:{path}", queues=QUEUES)
    await disk.store.write(f"{disk.device.backend}/multi-queue-max-queues", QUEUES)
    async with devices.guest(disk, queues=QUEUES, ring_pages=2) as guest:
        frontend = await guest.connect()
        writers = [Writer(frontend, ring, number) for number, ring in enumerate(frontend.rings)]
        if kind == "raw" or over:
            for number, writer in enumerate(writers):
                start = number * STRIPE * 512
                writer.content[:] = base.read_bytes()[start : start + STRIPE * 512]
        for writer in writers:
            writer.thread.start()
        try:
            for _ in range(3):
                await progress(writers, 10)
                await disk.kill()
                assert await disk.state() is State.CONNECTED
                disk.start()
            await progress(writers, 10)
        finally:
            for writer in writers:
                writer.end()
            for writer in writers:
                await trio.to_thread.run_sync(writer.thread.join)
        check(writers)
        for number, writer in enumerate(writers):
            read = await trio.to_thread.run_sync(frontend.read, number * STRIPE, STRIPE)
            assert read == writer.content, number
        # Killed once more with nothing in flight: what the guest was told is in the host's hands.
        await disk.kill()
        disk.start()
        await disk.await_log("connected again")
        await guest.close()
    await disk.detach()
    assert await disk.ended() == DONE
    with tapfs.open(path, format=format_name) as opened:
        for number, writer in enumerate(writers):
            assert opened.read(number * STRIPE * 512, STRIPE * 512) == writer.content, number
    if kind != "raw":
        assert tapfs.check(path).corruptions == 0
    assert [found.name for found in devices.runtime_directory.iterdir() if found.suffix != ".lock"] == []


async def test_a_plan_of_another_disks_life_is_not_executed(devices: Devices, tmp_path: Path) -> None:
    """The device is taken away while its process is dead, and another of the same number serves the image later."""
    path = tmp_path / "disk.qcow"
    tapfs.create(str(path), "qcow", SIZE)
    disk = await devices.serve(f"tap:qcow:{path}")
    async with devices.guest(disk) as guest:
        (await guest.connect()).write(0, b"lost" * 128)
        await disk.kill()
        await disk.remove()
    with await opened_when_free(path, "qcow") as opened:
        opened.write(0, b"other" * 100)
    again = await devices.serve(f"tap:qcow:{path}")
    async with devices.guest(again) as guest:
        assert (await guest.connect()).read(0, 1)[:500] == b"other" * 100
    assert await again.terminate() == STOPPED
    assert tapfs.check(path).corruptions == 0


async def test_the_frontend_begins_anew_while_nobody_serves_it(devices: Devices, tmp_path: Path) -> None:
    """The journal is of rings that are gone: nothing of it may be done to the new ones."""
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(SIZE))
    disk = await devices.serve(f"tap:aio:{path}")
    async with devices.guest(disk) as guest:
        (await guest.connect()).write(0, b"a" * 512)
        await disk.kill()
        for state in (State.CLOSING, State.CLOSED, State.INITIALISING):
            await guest.set_state(state)
        guest._forget_rings()
        disk.start()
        frontend = await guest.connect()
        assert frontend.read(0, 2) == b"a" * 512 + bytes(512)
