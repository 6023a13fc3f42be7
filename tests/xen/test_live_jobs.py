"""Commit and mirror of a disk while its guest writes: the disk, its name, and what a kill leaves."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import trio

import tapfs
from tapfs import ErrorKind, ImageError, NewImage
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
    tapfs.create_image(str(path), NewImage(NAMES[kind], SIZE))
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
        tapfs.create_image(str(other), NewImage("qcow2", SIZE, backing=str(raw), backing_format="raw"))
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


async def test_a_mirror_is_the_disk_of_one_moment_and_may_become_the_disk(devices: Devices, tmp_path: Path) -> None:
    path, backup, copy = tmp_path / "disk", tmp_path / "backup", tmp_path / "elsewhere" / "copy"
    copy.parent.mkdir()
    tapfs.create_image(str(path), NewImage("raw", SIZE))
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
