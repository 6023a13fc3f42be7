"""A snapshot after which the toolstack's name of the disk is the newest image, whatever ends at any moment."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import trio

import tapfs
from tapfs import ErrorKind, ImageError
from tapfs.disk import leaf
from tapfs.disk.leaf import exchange, overlay_for_name
from tapfs.disk.live import require_room_in_chain
from tapfs.host import ram
from tapfs.host.exchange import exchange_names
from tapfs.serving.disk_sandbox import FOLDERS_VARIABLE
from tests.xen.disk_device import Devices, DiskDevice
from tests.xen.test_disk_operations import SIZE, check_written, load_on, refused

A, B, C = b"a" * 512, b"b" * 512, b"c" * 512


def write(path: Path, sector: int, data: bytes, format_name: str) -> None:
    with tapfs.open(path, format=format_name, writable=True) as disk:
        disk.write(512 * sector, data)


def read(path: Path, sector: int, count: int = 1) -> bytes:
    with tapfs.open(path) as disk:
        return disk.read(512 * sector, 512 * count)


@pytest.mark.parametrize(("kind", "kept_is"), [("qcow", "qcow"), ("qcow2", "qcow2"), ("vhd", "vhd"), ("aio", "raw")])
async def test_a_guest_that_starts_again_has_what_it_wrote(
    devices: Devices, tmp_path: Path, kind: str, kept_is: str
) -> None:
    """A reboot is a new domain, for which the toolstack writes the same `params` as for the old one."""
    path, kept = tmp_path / "disk", tmp_path / "monday"
    tapfs.create(str(path), kept_is, SIZE)
    path.chmod(0o640)
    params = f"tap:{kind}:{path}"
    disk = await devices.serve(params)
    async with devices.guest(disk) as guest:
        frontend = await guest.connect()
        frontend.write(0, A)
        await disk.ask("swap", file=str(kept))
        frontend.write(1, B)
        await guest.close()
    await disk.detach()
    again = await devices.serve(params, domain=4)
    async with devices.guest(again) as guest:
        frontend = await guest.connect()
        assert frontend.read(0, 3) == A + B + bytes(512)
        frontend.write(2, C)
        assert (await again.ask("status"))["parents"] == [str(kept)]
        await guest.close()
    await again.detach()
    assert read(path, 0, 3) == A + B + C
    with tapfs.open(kept, format=kept_is) as below:
        assert below.read(0, 1536) == A + bytes(1024)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    with pytest.raises(ImageError) as caught:
        tapfs.open(kept, format=kept_is, writable=True)
    assert caught.value.kind is ErrorKind.READ_ONLY
    assert str(path) in str(caught.value)


async def test_what_went_past_the_page_cache_does_so_still(devices: Devices, raw: Path, tmp_path: Path) -> None:
    disk = await devices.serve(f"tap:aio:{raw}")
    assert directly_open(disk) == {raw.stat().st_ino}
    files = [raw]
    for name, keep_names in (("kept", False), ("over", True)):
        files.append(tmp_path / name)
        await disk.ask("swap", file=str(files[-1]), keep_names=keep_names)
        assert directly_open(disk) == {path.stat().st_ino for path in files}
        await disk.kill()
        disk.start()
        await devices.await_socket(disk)
        assert directly_open(disk) == {path.stat().st_ino for path in files}


def directly_open(disk: DiskDevice) -> set[int]:
    """The inodes of the files that the process of a disk has open with O_DIRECT."""
    assert disk.process is not None
    process = Path(f"/proc/{disk.process.pid}")
    found: set[int] = set()
    for entry in (process / "fd").iterdir():
        with suppress(FileNotFoundError):  # the process closes one now and then
            flags = (process / "fdinfo" / entry.name).read_text().split("flags:")[1].split()[0]
            if int(flags, 8) & os.O_DIRECT:
                found.add(entry.stat().st_ino)
    return found


async def test_snapshots_under_load_and_kills(devices: Devices, qcow: Path, tmp_path: Path) -> None:
    disk = await devices.serve(f"tap:qcow:{qcow}")
    async with devices.guest(disk, queues=2) as guest:
        await guest.connect()
        with load_on(guest) as load:
            for number in range(4):
                await load.progress()
                await disk.ask("swap", file=str(tmp_path / f"kept-{number}"))
                await load.progress()
                await disk.kill()
                disk.start()
                await devices.await_socket(disk)
            await load.progress()
            written = await load.stop()
        status = await disk.ask("status")
        assert status["path"] == str(qcow)
        assert status["parents"] == [str(tmp_path / f"kept-{number}") for number in (3, 2, 1, 0)]
        await guest.close()
    await disk.detach()
    check_written(qcow, written)


async def test_a_swap_that_ended_before_the_exchange_is_none(devices: Devices, qcow: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    write(qcow, 0, A, "qcow")
    with tapfs.open(qcow, writable=True) as image:
        overlay_for_name(image, str(kept), None, told="qcow").layer.close()
    disk = await devices.serve(f"tap:qcow:{qcow}")
    async with devices.guest(disk) as guest:
        frontend = await guest.connect()
        frontend.write(1, B)
        await disk.ask("swap", file=str(kept))  # under the same name: what was left is no obstacle
        frontend.write(2, C)
        await guest.close()
    await disk.detach()
    assert read(qcow, 0, 3) == A + B + C
    assert read(kept, 0, 3) == A + B + bytes(512)


async def test_a_swap_that_ended_after_the_exchange_is_whole(devices: Devices, raw: Path, tmp_path: Path) -> None:
    """Nothing in xenstore says so then; the raw disk looks like an image, which a guest can write."""
    forged = tmp_path / "forged.qcow"
    tapfs.create(str(forged), "qcow", SIZE, backing="/etc/passwd", backing_format="raw")
    header = forged.read_bytes()[:512]
    write(raw, 0, header, "raw")
    kept = tmp_path / "kept"
    with tapfs.open(raw, format="raw", writable=True) as image:
        overlaid = overlay_for_name(image, str(kept), None, told="raw")
        exchange(image, overlaid)
        overlaid.layer.close()
    disk = await devices.serve(f"tap:aio:{raw}")
    async with devices.guest(disk) as guest:
        frontend = await guest.connect()
        frontend.write(1, B)
        assert frontend.read(0, 2) == header + B
        await guest.close()
    await disk.detach()
    assert kept.read_bytes()[:1024] == header + bytes(512)


def test_a_swap_that_ended_with_the_exchange_leaves_a_base_that_is_not_written(
    qcow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept"

    def exchange_and_end(first: str, second: str) -> None:
        exchange_names(first, second)
        raise KeyboardInterrupt

    monkeypatch.setattr(leaf, "exchange_names", exchange_and_end)
    with tapfs.open(qcow, format="qcow", writable=True) as image:
        overlaid = overlay_for_name(image, str(kept), None, told="qcow")
        with pytest.raises(KeyboardInterrupt):
            exchange(image, overlaid)
        overlaid.layer.close()
    with pytest.raises(ImageError, match=f"is the base of the overlay {qcow}"):
        tapfs.open(kept, format="qcow", writable=True)
    # Had the names not been exchanged, the note would say nothing.
    exchange_names(str(qcow), str(kept))
    tapfs.open(qcow, format="qcow", writable=True).close()


async def test_the_formats_of_parents_hold_for_the_file_that_has_the_name(
    devices: Devices, qcow: Path, tmp_path: Path
) -> None:
    """A qcow image does not say of what format its parent is, so xenstore does, for both sides of a swap."""
    forged, overlay, kept = tmp_path / "forged.qcow", tmp_path / "overlay.qcow", tmp_path / "kept"
    tapfs.create(str(forged), "qcow", SIZE, backing="/etc/passwd", backing_format="raw")
    forged.write_bytes(forged.read_bytes().ljust(SIZE, b"\0"))
    header = forged.read_bytes()[:512]
    tapfs.create(str(overlay), "qcow", backing=str(forged), backing_format="raw")
    disk = await devices.serve(f"tap:qcow:{overlay}", backing_formats="raw")
    async with devices.guest(disk) as guest:
        frontend = await guest.connect()
        await disk.ask("swap", file=str(kept))
        assert await disk.read("tapfs/backing-formats") == "raw"
        assert (await disk.read("tapfs/swap") or "").endswith(" qcow,raw")
        await disk.kill()
        disk.start()
        assert await trio.to_thread.run_sync(frontend.read, 0, 1) == header
        await disk.kill()
        # As if the names had never been exchanged.
        overlay.unlink()
        kept.rename(overlay)
        disk.start()
        await devices.await_socket(disk)
        assert await trio.to_thread.run_sync(frontend.read, 0, 1) == header


async def test_a_name_that_cannot_pass_to_a_file(
    devices: Devices, ram_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDERS_VARIABLE, str(tmp_path))
    tapfs.create(ram_name, "ram", SIZE)
    disk = await devices.serve(f"tap:{ram_name}")
    error = await refused(disk, "swap", file=str(tmp_path / "kept"))
    assert error.kind is ErrorKind.UNSUPPORTED
    assert "keep_names" in str(error)
    await disk.ask("swap", file=str(tmp_path / "overlay"), keep_names=True)
    # Who opens the old name for the guest's next life is told.
    again = await devices.attach(f"tap:{ram_name}", domain=4)
    assert await again.await_key("tapfs/status", "ready", "failed") == "failed"
    assert str(tmp_path / "overlay") in (await again.read("tapfs/error") or "")


async def test_a_swap_that_fails_leaves_the_names(
    devices: Devices, qcow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDERS_VARIABLE, os.path.dirname(ram.host_path("ram:any")))
    there = tmp_path / "there"
    there.write_bytes(b"precious")
    disk = await devices.serve(f"tap:qcow:{qcow}")
    before = qcow.stat().st_ino
    ask = partial(refused, disk, "swap")
    async with devices.guest(disk) as guest:
        frontend = await guest.connect()
        frontend.write(0, A)
        assert (await ask(file=str(there))).kind is ErrorKind.EXISTS
        assert (await ask(file=str(qcow))).kind is ErrorKind.EXISTS
        assert (await ask(file="/nowhere/kept")).kind is ErrorKind.NOT_FOUND
        assert (await ask(file="relative")).kind is ErrorKind.INVALID_FORMAT
        outside = await ask(file="/var/lib/kept")
        assert (outside.kind, FOLDERS_VARIABLE in str(outside)) == (ErrorKind.DENIED, True)
        assert (await ask(file=str(tmp_path / "kept"), size=SIZE // 2)).kind is ErrorKind.OUT_OF_BOUNDS
        elsewhere = Path(ram.host_path(f"ram:tapfs-test-{os.getpid()}"))  # another file system
        assert (await ask(file=str(elsewhere))).kind is ErrorKind.UNSUPPORTED
        assert not elsewhere.exists()
        devices.refuse_connections()
        await devices.lose_xenstored()
        assert (await ask(file=str(tmp_path / "kept"))).kind is ErrorKind.IO
        devices.refuse_connections(refuse=False)
        frontend.write(1, B)
        assert frontend.read(0, 2) == A + B
        await guest.close()
        await disk.detach()
    assert qcow.stat().st_ino == before
    assert there.read_bytes() == b"precious"
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == sorted([qcow.name, there.name])
    assert read(qcow, 0, 2) == A + B


async def test_an_image_of_several_files_stays_in_its_folder(devices: Devices, tmp_path: Path) -> None:
    path = tmp_path / "disk.vmdk"
    tapfs.create(str(path), "vmdk", SIZE, options={"subformat": "monolithicFlat"})
    (tmp_path / "other").mkdir()
    disk = await devices.serve(f"tap:vmdk:{path}")
    async with devices.guest(disk) as guest:
        frontend = await guest.connect()
        frontend.write(0, A)
        assert (await refused(disk, "swap", file=str(tmp_path / "other" / "kept"))).kind is ErrorKind.UNSUPPORTED
        await disk.ask("swap", file=str(tmp_path / "kept.vmdk"))
        frontend.write(1, B)
        await guest.close()
    await disk.detach()
    assert read(path, 0, 2) == A + B
    assert read(tmp_path / "kept.vmdk", 0, 2) == A + bytes(512)


def test_an_image_that_names_its_parent_from_its_folder_stays_there(tmp_path: Path) -> None:
    """Under a name in another folder it would look for the parent there."""
    disk, other = tmp_path / "disk", tmp_path / "other"
    other.mkdir()
    tapfs.create(str(tmp_path / "base"), "qcow2", SIZE)
    tapfs.create(str(disk), "qcow2", SIZE, backing="base", backing_format="qcow2")
    with tapfs.open(disk, writable=True) as image:
        with pytest.raises(ImageError, match="from the folder") as caught:
            overlay_for_name(image, str(other / "kept"), None, told="qcow2")
        assert caught.value.kind is ErrorKind.UNSUPPORTED
        overlay_for_name(image, str(tmp_path / "kept"), None, told="qcow2").discard()


def test_no_chain_is_made_that_nobody_could_open(qcow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tapfs.open(qcow, writable=True) as image:
        require_room_in_chain(image)
        monkeypatch.setattr("tapfs.disk.live.MAX_DEPTH", 1)
        with pytest.raises(ImageError, match="commit it first") as caught:
            require_room_in_chain(image)
    assert caught.value.kind is ErrorKind.UNSUPPORTED
