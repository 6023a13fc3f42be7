"""Commit and mirror of a disk while its guest writes: the disk, its name, and what a kill leaves."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import trio
import trio.testing

import tapfs
from tapfs import ErrorKind, ImageError
from tapfs.disk.plan_log import PlanLog
from tapfs.serving.disk_operations import RateLimit
from tapfs.serving.held_requests import HeldRequests
from tapfs.serving.live_jobs import LiveJobs
from tapfs.xen.disk.backend import Backend
from tapfs.xen.disk.operations import Operations
from tapfs.xen.disk.served_disk import ServedDisk
from tapfs.xen.disk.settings import DiskSettings
from tapfs.xen.specification import parse_specification
from tests.xen.disk_device import STOPPED, Devices, DiskDevice
from tests.xen.machine import PATIENCE
from tests.xen.test_disk_operations import SIZE, check_written, load_on, refused

NAMES = {"qcow": "qcow", "qcow2": "qcow2", "vhd": "vhd", "aio": "raw"}


async def job_has_begun(disk: DiskDevice) -> None:
    with trio.fail_after(PATIENCE):
        while not (await disk.ask("job")).get("data_bytes"):
            await trio.sleep(0.01)


async def test_a_commit_under_load_gives_the_name_back(devices: Devices, tmp_path: Path) -> None:
    kind = "aio"
    path, kept = tmp_path / "disk", tmp_path / "monday"
    tapfs.create(str(path), NAMES[kind], SIZE)
    before = path.stat().st_ino
    params = f"tap:{kind}:{path}"
    disk = await devices.serve(params)
    async with devices.guest(disk, queues=2) as guest:
        await guest.connect()
        with load_on(guest) as load:
            await load.progress()
            await disk.ask("swap", file=str(kept))
            await load.progress()
            answer = await disk.ask("commit")
            assert answer["data_bytes"]
            await load.progress()
            status = await disk.ask("status")
            assert (status["path"], status["format"], status["parents"]) == (str(path), NAMES[kind], [])
            written = await load.stop()
        await guest.close()
    await disk.detach()
    assert path.stat().st_ino == before
    assert not kept.exists()
    check_written(path, written, format=NAMES[kind])
    again = await devices.serve(params, domain=4)  # as after a reboot
    assert (await again.ask("status"))["parents"] == []


async def test_a_commit_that_is_killed_is_begun_anew(devices: Devices, qcow: Path, tmp_path: Path) -> None:
    kept, moments = tmp_path / "kept", random.Random(3)
    disk = await devices.serve(f"tap:qcow:{qcow}")
    async with devices.guest(disk, queues=2) as guest:
        await guest.connect()
        with load_on(guest) as load:
            await load.progress(300)
            await disk.ask("swap", file=str(kept))
            await load.progress(300)
            for _ in range(2):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(commit_that_fails, disk)
                    await job_has_begun(disk)
                    await trio.sleep(moments.random() / 5)
                    await disk.kill()
                    disk.start()
                    await devices.await_socket(disk)
                assert (await disk.ask("status"))["parents"] == [str(kept)]
                await load.progress()
            await disk.ask("commit")
            await load.progress()
            written = await load.stop()
        assert (await disk.ask("status"))["parents"] == []
        await guest.close()
    await disk.detach()
    check_written(qcow, written, format="qcow")
    assert tapfs.check(qcow).corruptions == 0


async def commit_that_fails(disk: DiskDevice) -> None:
    with pytest.raises(ImageError):
        await disk.ask("commit", rate=1 << 20)


async def test_a_commit_that_is_ended_changes_nothing(devices: Devices, qcow: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    disk = await devices.serve(f"tap:qcow:{qcow}")
    async with devices.guest(disk) as guest:
        await guest.connect()
        with load_on(guest) as load:
            await load.progress()
            await disk.ask("swap", file=str(kept))
            await load.progress(300)
            for end in ("cancel", "stop", "detach"):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(commit_that_fails, disk)
                    await job_has_begun(disk)
                    for command in ("commit", "swap", "resize"):
                        assert (await refused(disk, command, file=str(tmp_path / "x"))).kind is ErrorKind.LOCKED
                    if end == "cancel":
                        await disk.ask("cancel")
                        continue
                    if end == "stop":
                        assert await disk.terminate() == STOPPED
                        disk.start()
                        await devices.await_socket(disk)
                        continue
                    written = await load.stop()
                    await guest.close()
                    await disk.detach()
    check_written(qcow, written)
    with pytest.raises(ImageError):  # it lies below its overlay as before
        tapfs.open(kept, format="qcow", writable=True)
    assert tapfs.check(kept).corruptions == 0


async def test_a_commit_that_keeps_the_names_leaves_an_empty_overlay(
    devices: Devices, raw: Path, tmp_path: Path
) -> None:
    overlay, other = tmp_path / "overlay", tmp_path / "other"
    disk = await devices.serve(f"tap:aio:{raw}")
    assert (await refused(disk, "commit")).kind is ErrorKind.UNSUPPORTED  # to what?
    async with devices.guest(disk) as guest:
        frontend = await guest.connect()
        await disk.ask("swap", file=str(overlay), keep_names=True)
        frontend.write(1, b"a" * 512)
        with tapfs.open(raw, format="raw"):
            assert (await refused(disk, "commit", keep_names=True)).kind is ErrorKind.LOCKED
        tapfs.create(str(other), "qcow2", SIZE, backing=str(raw), backing_format="raw")
        error = await refused(disk, "commit", keep_names=True)
        assert error.kind is ErrorKind.READ_ONLY
        assert str(other) in str(error)
        other.unlink()
        await disk.ask("commit", keep_names=True)
        frontend.write(2, b"b" * 512)
        assert frontend.read(0, 3) == bytes(512) + b"a" * 512 + b"b" * 512
        await guest.close()
    await disk.detach()
    assert raw.read_bytes()[:1536] == bytes(512) + b"a" * 512 + b"b" * 512
    with tapfs.open(overlay) as over:
        assert over.read(0, 1536) == raw.read_bytes()[:1536]
    with tapfs.open(raw, format="raw", writable=True):  # the note of the overlay is gone
        pass


async def test_a_commit_that_empties_an_overlay_gives_back_the_space_of_its_data_file(
    devices: Devices, raw: Path, tmp_path: Path
) -> None:
    overlay, data = tmp_path / "overlay", tmp_path / "overlay.data"
    options = {"data_file": data.name}
    tapfs.create(str(overlay), "qcow2", SIZE, backing=str(raw), backing_format="raw", options=options)
    disk = await devices.serve(f"tap:qcow2:{overlay}")
    async with devices.guest(disk) as guest:
        frontend = await guest.connect()
        frontend.write(128, b"a" * 512)
        assert data.stat().st_blocks > 0
        await disk.ask("commit", keep_names=True)
        assert data.stat().st_blocks == 0
        frontend.write(129, b"b" * 512)
        assert frontend.read(128, 2) == b"a" * 512 + b"b" * 512
        await guest.close()
    await disk.detach()
    assert data.stat().st_blocks == 0  # the disk is the base alone
    for path, format_name in ((raw, "raw"), (overlay, "qcow2")):
        with tapfs.open(path, format=format_name) as image:
            assert image.read(65536, 1024) == b"a" * 512 + b"b" * 512
    assert tapfs.check(overlay).corruptions == 0


async def test_a_mirror_is_the_disk_of_one_moment_and_may_become_the_disk(devices: Devices, tmp_path: Path) -> None:
    path, backup, copy = tmp_path / "disk", tmp_path / "backup", tmp_path / "elsewhere" / "copy"
    copy.parent.mkdir()
    tapfs.create(str(path), "raw", SIZE)
    disk = await devices.serve(f"tap:aio:{path}")
    async with devices.guest(disk, queues=2) as guest:
        await guest.connect()
        with load_on(guest) as load:
            await load.progress(50)
            before = dict(load.written)
            await disk.ask("mirror", file=str(backup), format="qcow")
            assert (await refused(disk, "mirror", file=str(backup), format="raw")).kind is ErrorKind.EXISTS
            assert (await refused(disk, "mirror", file="/nowhere/x", format="raw")).kind is ErrorKind.NOT_FOUND
            async with trio.open_nursery() as nursery:
                nursery.start_soon(mirror_that_fails, disk, tmp_path / "ended")
                await job_has_begun(disk)
                await disk.ask("cancel")
            await disk.ask("mirror", file=str(copy), format="qcow2", pivot=True)
            await load.progress()
            status = await disk.ask("status")
            assert (status["path"], status["format"]) == (str(path), "qcow2")
            written = await load.stop()
        await guest.close()
    await disk.detach()
    check_written(backup, {sector: data for sector, data in before.items() if written[sector] == data})
    check_written(copy, written, format="qcow2")
    assert path.resolve() == copy
    assert sorted(each.name for each in tmp_path.iterdir()) == ["backup", "disk", "disk.mirrored", "elsewhere"]
    again = await devices.serve(f"tap:aio:{path}", domain=4)  # as after a reboot
    assert (await again.ask("status"))["format"] == "qcow2"


async def mirror_that_fails(disk: DiskDevice, path: Path) -> None:
    with pytest.raises(ImageError):
        await disk.ask("mirror", file=str(path), format="raw", rate=1 << 14)


class AloneDisk:
    """A disk without a guest, in this process, and the jobs on it. `changing` is the lock of its operations."""

    def __init__(self, folder: Path) -> None:
        path, self._target = folder / "disk", folder / "mirror"
        path.write_bytes(random.Random(1).randbytes(SIZE))
        self.held = HeldRequests("space", lambda: None)
        image = tapfs.open(path, format="raw", writable=True)
        self.disk = ServedDisk(image, machine=None, domain=1, limit=RateLimit(), paused=False, held=self.held)
        self.changing = trio.Lock()
        settings = DiskSettings(parse_specification(f"tap:raw:{path}"), "w")
        plan_log = PlanLog(folder / "plan", "token")
        backend = cast("Backend", SimpleNamespace(disk=self.disk, changing=self.changing, is_to_take_over=False))
        self.jobs = LiveJobs(Operations(backend, settings, plan_log), self.disk, plan_log, key_file=None)

    async def mirror(self) -> None:
        """A mirror that takes far too long."""
        await self.jobs.mirror(str(self._target), "raw", rate=1 << 10, overwrite=False, pivot=False, keep_names=False)

    async def cancel_until_it_waits_for_the_lock(self) -> None:
        """End the mirror, which waits then for the lock, that this task has."""
        with trio.fail_after(PATIENCE):
            while not self.jobs.status().get("data_bytes"):
                await trio.sleep(0.01)
            await self.changing.acquire()
            self.jobs.cancel()
            while not self.changing.statistics().tasks_waiting:
                await trio.sleep(0.01)

    async def have_a_request_wait(self, nursery: trio.Nursery) -> None:
        """Have a request of the guest wait for space, until `held.give_up`."""

        def attempt() -> None:
            raise ImageError(ErrorKind.NO_SPACE, "is full")

        def serve() -> None:
            with pytest.raises(ImageError, match="is full"):
                self.held.serve(attempt, attempt)

        nursery.start_soon(trio.to_thread.run_sync, serve)
        with trio.fail_after(PATIENCE):
            while self.held.reason is None:
                await trio.sleep(0.01)


async def test_a_job_that_ends_while_the_guest_waits_for_space_leaves_the_disk(tmp_path: Path) -> None:
    """The request waits from the last moment at which it can: what ends the job has looked already."""
    alone = AloneDisk(tmp_path)
    errors: list[ImageError] = []

    async def mirror() -> None:
        with pytest.raises(ImageError) as caught:
            await alone.mirror()
        errors.append(caught.value)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(mirror)
        await alone.cancel_until_it_waits_for_the_lock()
        await alone.have_a_request_wait(nursery)
        alone.changing.release()
        await trio.testing.wait_all_tasks_blocked(0.05)
        alone.held.give_up()
    assert "was ended before it was done" in str(errors[0])
    assert alone.jobs.status() == {"job": None}
    alone.disk.close()


async def test_a_process_ends_though_a_job_is_being_undone(tmp_path: Path) -> None:
    """Its end keeps the lock of the operations for good."""
    alone, conversation, ended = AloneDisk(tmp_path), trio.CancelScope(), trio.Event()

    async def mirror() -> None:
        with conversation:
            await alone.mirror()
        ended.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(mirror)
        await alone.cancel_until_it_waits_for_the_lock()
        await trio.to_thread.run_sync(alone.disk.close)
        conversation.cancel()
        with trio.move_on_after(PATIENCE):
            await ended.wait()
        in_time = ended.is_set()
        alone.changing.release()
    assert in_time, "it would wait for ever"
