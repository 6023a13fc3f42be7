"""Two domains of one virtual machine at one disk: migration with and without locks, and who is no migration."""

from __future__ import annotations

from pathlib import Path

import pytest

import tapfs
from tapfs.xen.device import State
from tests.xen import libxl
from tests.xen.disk_device import DISK_BYTES, DONE, FAILED, Devices, DiskDevice
from tests.xen.xenstore_tree import Change
from tests.xen.xenstored import Xenstored

SOURCE, DESTINATION, STRANGER = 1, 2, 3
BEFORE, AFTER = b"before  " * 512, b"after   " * 512


async def end(devices: Devices, disk: DiskDevice) -> None:
    """The end of a suspended domain that libxl destroys: nobody answers for its frontend any more."""
    await libxl.ask_for_removal(devices.store, disk.device)
    await devices.store.remove(disk.device.frontend)
    assert await disk.ended() == DONE
    await libxl.remove_disk(devices.store, disk.device)


async def suspend(devices: Devices, xenstored: Xenstored, domain: int) -> None:
    """What xenstore says of a guest that is asked to suspend itself and does."""
    request = f"/local/domain/{domain}/control/shutdown"
    await devices.store.write(request, "suspend")
    await devices.store.write(request, "")
    xenstored.fire([Change("@releaseDomain")])


async def test_a_migration_within_a_host_waits_for_the_source(
    devices: Devices, xenstored: Xenstored, qcow: Path
) -> None:
    source = await devices.serve(f"tap:qcow:{qcow}", domain=SOURCE, kind="vbd")
    async with devices.guest(source) as guest:
        frontend = await guest.connect()
        xenstored.introduce(DESTINATION, "guest")
        xenstored.introduce(STRANGER, "another")
        for domain, uuid in ((SOURCE, "a"), (DESTINATION, "a"), (STRANGER, "b")):
            await libxl.name_machine(devices.store, domain, uuid)
        destination = await devices.serve(f"tap:qcow:{qcow}", domain=DESTINATION, kind="vbd")
        stranger = await devices.attach(f"tap:qcow:{qcow}", domain=STRANGER, kind="vbd")
        assert await stranger.ended() == FAILED, "another machine's disk was not refused"
        assert "domain 3 xvda (another, b): " in stranger.log
        frontend.write(0, BEFORE)
    async with devices.guest(destination) as guest:
        await guest.publish()
        await destination.await_log("waiting: ")
        assert await destination.state() is State.INIT_WAIT
        await end(devices, source)
        await guest.await_backend(State.CONNECTED)
        await guest.set_state(State.CONNECTED)
        assert guest.frontend.read(0, len(BEFORE) // 512) == BEFORE
        guest.frontend.write(64, AFTER)
        await guest.close()
    await end(devices, destination)
    assert tapfs.check(qcow, format="qcow").corruptions == 0
    with tapfs.open(qcow, format="qcow") as image:
        assert image.read(64 * 512, len(AFTER)) == AFTER


@pytest.mark.parametrize(("format_name", "name"), [("qcow", "guest"), ("vhdx", "guest--incoming")])
async def test_a_migration_without_locks_reads_nothing_stale(
    devices: Devices, xenstored: Xenstored, tmp_path: Path, format_name: str, name: str
) -> None:
    """The destination has opened the image, or looked at it, before the source's last writes."""
    path = tmp_path / "disk"
    tapfs.create(str(path), format_name, DISK_BYTES)
    # Both let each other in, as on storage where neither sees the other's locks.
    params = f"tap:{format_name}:{path},xvda,w!"
    source = await devices.serve(params, domain=SOURCE, kind="vbd")
    xenstored.introduce(DESTINATION, name)
    destination = await devices.serve(params, domain=DESTINATION, kind="vbd")
    async with devices.guest(source) as guest:
        frontend = await guest.connect()
        frontend.write(0, BEFORE)
        await suspend(devices, xenstored, SOURCE)
        await source.await_log("at rest")
    async with devices.guest(destination) as guest:
        frontend = await guest.connect()
        assert frontend.read(0, len(BEFORE) // 512) == BEFORE
        frontend.write(0, AFTER)
        frontend.flush()
        # The end of the source writes nothing more.
        before = path.read_bytes()
        await end(devices, source)
        assert path.read_bytes() == before
        frontend.write(2048, AFTER)
        assert frontend.read(0, len(AFTER) // 512) == AFTER
        await guest.close()
    await end(devices, destination)
    assert tapfs.check(path, format=format_name).corruptions == 0
    with tapfs.open(path, format=format_name) as image:
        assert image.read(0, len(AFTER)) == image.read(2048 * 512, len(AFTER)) == AFTER


async def test_a_guest_that_goes_on_after_a_suspend_writes_on(
    devices: Devices, xenstored: Xenstored, tmp_path: Path
) -> None:
    """A migration that failed, or a checkpoint: the same guest goes on with the same rings."""
    path = tmp_path / "disk.vhdx"
    tapfs.create(str(path), "vhdx", DISK_BYTES)
    disk = await devices.serve(f"tap:vhdx:{path}", kind="vbd")
    async with devices.guest(disk) as guest:
        frontend = await guest.connect()
        frontend.write(0, BEFORE)
        await suspend(devices, xenstored, SOURCE)
        await disk.await_log("at rest")
        rested = path.read_bytes()
        frontend.write(2048, AFTER)
        frontend.flush()
        assert path.read_bytes() != rested
        assert frontend.read(0, len(BEFORE) // 512) == BEFORE
        await guest.close()
    await end(devices, disk)
    assert tapfs.check(path, format="vhdx").corruptions == 0
    with tapfs.open(path) as image:
        assert image.read(2048 * 512, len(AFTER)) == AFTER
