"""A raw disk on a block device with sectors of 4096 bytes: what the guest is told, and requests that fit none."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

import tapfs
from tests.xen.disk_device import Devices

MEBIBYTES = 4
GPT = b"label: gpt\nstart=256, size=128, name=data\n"


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """A loop device with such sectors, and a partition table that counts by them."""
    path = tmp_path / "lun"
    path.write_bytes(bytes(MEBIBYTES << 20))
    loop = subprocess.run(
        ["losetup", "--find", "--show", "--sector-size", "4096", path], check=True, capture_output=True, text=True
    ).stdout.strip()
    try:
        subprocess.run(["sfdisk", "-q", "--no-reread", "--no-tell-kernel", loop], input=GPT, check=True)
        yield Path(loop)
    finally:
        subprocess.run(["losetup", "-d", loop], check=True)


@pytest.mark.parametrize("kind", ["aio", "sync"])
async def test_a_device_of_large_sectors(devices: Devices, device: Path, kind: str) -> None:
    disk = await devices.serve(f"tap:{kind}:{device}")
    async with devices.guest(disk) as guest:
        frontend = await guest.connect()
        assert [await disk.read(name) for name in ("sectors", "sector-size", "physical-sector-size")] == [
            str(MEBIBYTES << 11),
            "4096",
            "4096",
        ]
        expected = bytearray(await trio.to_thread.run_sync(frontend.read, 0, 64))
        assert expected[4096:4104] == b"EFI PART"
        # Firmware and boot loaders may ask for 512 bytes all the same.
        for sector, count in ((3, 1), (15, 2), (21, 7), (63, 1)):
            data = bytes([sector]) * (count * 512)
            await trio.to_thread.run_sync(frontend.write, sector, data)
            expected[sector * 512 : sector * 512 + len(data)] = data
        assert await trio.to_thread.run_sync(frontend.read, 0, 64) == expected
        assert await trio.to_thread.run_sync(frontend.read, 21, 3) == expected[21 * 512 : 24 * 512]
        await guest.close()


def test_an_overlay_has_the_sectors_of_the_device(device: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "over.qcow2"
    tapfs.create(str(overlay), "qcow2", backing=str(device), backing_format="raw")
    with tapfs.open(overlay) as image:
        assert image.sector_size == 4096
        partitions = image.contents().table.partitions
    assert [(each.start, each.name) for each in partitions] == [(256 * 4096, "data")]
