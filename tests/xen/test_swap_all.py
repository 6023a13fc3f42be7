"""Snapshots of several disks of a guest at one moment, or of none of them."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import trio

import tapfs
from tapfs import ErrorKind, ImageError
from tapfs.xen.toolstack import swap_all as swap_all_module
from tapfs.xen.toolstack.swap_all import swap_all
from tests.xen.disk_device import Devices
from tests.xen.frontend import Frontend
from tests.xen.test_disk_operations import SIZE


class Chain(threading.Thread):
    """A guest that writes a number to one disk and, when that was answered, to the other."""

    def __init__(self, first: Frontend, second: Frontend) -> None:
        super().__init__()
        self._disks = (first, second)
        self.number = 0
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.is_set():
            self.number += 1
            for disk in self._disks:
                disk.write(0, self.number.to_bytes(512, "little"))


def number_in(path: Path) -> int:
    with tapfs.open(path, format="qcow2") as disk:
        return int.from_bytes(disk.read(0, 512), "little")


async def test_all_disks_are_of_one_moment(devices: Devices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hook, log = tmp_path / "hook", tmp_path / "log"
    hook.write_text(f'#!/bin/sh\necho "$1" >>{log}\n')
    hook.chmod(0o755)
    paths = [tmp_path / "first", tmp_path / "second"]
    disks = []
    for path, vdev in zip(paths, ("xvda", "xvdb"), strict=True):
        tapfs.create(str(path), "qcow2", SIZE)
        disks.append(await devices.serve(f"tap:qcow2:{path}", vdev=vdev))
    async with devices.guest(disks[0]) as one, devices.guest(disks[1]) as two:
        chain = Chain(await one.connect(), await two.connect())
        chain.start()
        try:
            for turn in range(3):
                with trio.fail_after(60):
                    while chain.number < 20 * turn + 20:
                        await trio.sleep(0.002)
                made = await swap_all(devices.store, 1, f".{turn}", freeze=str(hook))
                assert [swapped.images for swapped in made] == [turn + 2] * 2
                first, second = (number_in(Path(f"{path}.{turn}")) for path in paths)
                assert first - second in (0, 1), "the second disk has what the first one lacks"
            assert log.read_text() == "freeze\nthaw\n" * 3
            # One of them cannot be made: there is none.
            Path(f"{paths[1]}.x").write_bytes(b"precious")
            with pytest.raises(ImageError) as caught:
                await swap_all(devices.store, 1, ".x", freeze=str(hook))
            assert caught.value.kind is ErrorKind.EXISTS
            assert not Path(f"{paths[0]}.x").exists()
            # They come too late.
            monkeypatch.setattr(swap_all_module, "_HOLD_SECONDS", 0)
            with pytest.raises(ImageError, match="went on before"):
                await swap_all(devices.store, 1, ".y", freeze=None)
            assert [len((await disk.ask("status"))["parents"]) for disk in disks] == [3, 3]  # type: ignore[arg-type]
            assert not [path for path in tmp_path.iterdir() if path.suffix == ".y"]
        finally:
            chain.stop.set()
            await trio.to_thread.run_sync(chain.join)
        await one.close()
        await two.close()


async def test_the_snapshot_of_a_disk_that_was_moved_lies_beside_its_image(devices: Devices, tmp_path: Path) -> None:
    """Its name is a link since the mirror, and the folder of that may be on another file system."""
    name, image = tmp_path / "disk", tmp_path / "fast" / "image"
    image.parent.mkdir()
    tapfs.create(str(image), "qcow2", SIZE)
    name.symlink_to(image)
    disk = await devices.serve(f"tap:qcow2:{name}")
    made = await swap_all(devices.store, 1, ".monday", freeze=None)
    assert [swapped.file for swapped in made] == [f"{image}.monday"]
    assert (await disk.ask("status"))["parents"] == [f"{image}.monday"]
    assert name.is_symlink()
