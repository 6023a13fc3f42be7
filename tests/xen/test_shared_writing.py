"""Mode w! as xl can say it: behind the target, where libxl itself writes mode w; and what is done to such a disk."""

from __future__ import annotations

from pathlib import Path

import pytest

import tapfs
from tapfs.errors import ErrorKind, ImageError
from tests.xen.disk_device import DISK_BYTES, FAILED, Devices, DiskDevice
from tests.xen.libxl import ask_for_removal, remove_disk


@pytest.fixture
def overlay(qcow: Path, tmp_path: Path) -> Path:
    path = tmp_path / "overlay.qcow"
    tapfs.create(str(path), "qcow", DISK_BYTES, backing=str(qcow), backing_format="qcow")
    return path


async def by_xl(devices: Devices, path: Path, *, shared: bool, domain: int, mode: str = "w") -> DiskDevice:
    """A disk of xl's, whose process is open or has refused it."""
    target = f"tap:qcow:{path}" + (",xvda,w!" if shared else "")
    disk = await devices.attach(target, mode, domain=domain, kind="vbd")
    await disk.await_key("tapfs/status", "ready", "failed")
    return disk


@pytest.mark.parametrize(
    ("first", "second", "let_in"), [(True, True, True), (True, False, False), (False, True, False)]
)
async def test_both_writers_have_to_allow_it(
    devices: Devices, qcow: Path, *, first: bool, second: bool, let_in: bool
) -> None:
    one = await by_xl(devices, qcow, shared=first, domain=1)
    two = await by_xl(devices, qcow, shared=second, domain=2)
    assert await one.read("mode") == await two.read("mode") == "w"
    assert await one.read("tapfs/status") == "ready"
    if let_in:
        assert await two.read("tapfs/status") == "ready"
        assert "two writers destroy a qcow image" in two.log
        return
    assert await two.ended() == FAILED
    assert await two.read("tapfs/error-kind") == ErrorKind.LOCKED.value
    assert "mode w! in every place (both must allow it)" in (await two.read("tapfs/error") or "")


async def test_a_reader_comes_and_goes_beside_those_who_share(devices: Devices, qcow: Path) -> None:
    await by_xl(devices, qcow, shared=True, domain=1)
    reader = await by_xl(devices, qcow, shared=True, domain=2, mode="r")
    assert await reader.read("tapfs/status") == "ready"
    assert (await reader.ask("status"))["mode"] == "r"


async def test_an_image_that_others_write_is_neither_copied_nor_replaced(
    devices: Devices, overlay: Path, tmp_path: Path
) -> None:
    """What the others write goes past the marks of a job, and into the old image after a change of names."""
    one = await devices.serve(f"tap:qcow:{overlay}", "w!")
    two = await by_xl(devices, overlay, shared=True, domain=2)
    changes: list[tuple[str, dict[str, object]]] = [
        ("commit", {}),
        ("commit", {"keep_names": True}),
        ("swap", {"file": str(tmp_path / "monday")}),
        ("mirror", {"file": str(tmp_path / "backup"), "format": "qcow2"}),
        ("mirror", {"file": str(tmp_path / "copy"), "format": "qcow2", "pivot": True}),
    ]
    for command, arguments in changes:
        with pytest.raises(ImageError, match="is being written by another process"):
            await one.ask(command, **arguments)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".lock") == ["disk.qcow", "overlay.qcow"]
    # Another may come, as before.
    three = await by_xl(devices, overlay, shared=True, domain=3)
    assert await three.read("tapfs/status") == "ready"
    for disk in (two, three):
        await ask_for_removal(devices.store, disk.device)
        await disk.ended()
        await remove_disk(devices.store, disk.device)
    # Alone it is changed, and shared afterwards.
    for command, arguments in changes[2:]:
        await one.ask(command, **arguments)
    four = await by_xl(devices, overlay, shared=True, domain=4)
    assert await four.read("tapfs/status") == "ready", four.log
