"""The process of a guest's disk is in a sandbox: a driver that is evil on purpose gets nowhere in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.evil_driver import ATTEMPTS, EvilDriver
from tests.xen.disk_device import Devices

#: Who finds xenstored again after it was gone connects to a Unix socket.
CONNECTS = {"connect to a socket"}
#: An overlay of a disk in use is made beside its image.
BESIDE = {"write beside", "overwrite beside"}


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EvilDriver]:
    made = EvilDriver(tmp_path)
    for name, value in made.environment.items():
        monkeypatch.setenv(name, value)
    yield made
    made.close()


@pytest.mark.parametrize(("mode", "possible"), [("r", CONNECTS), ("w", CONNECTS | BESIDE)])
async def test_an_evil_driver_gets_nowhere(devices: Devices, evil: EvilDriver, mode: str, possible: set[str]) -> None:
    disk = await devices.serve(evil.image, mode)
    assert (await disk.ask("status"))["sandbox"] == "on"
    async with devices.guest(disk) as guest:
        assert (await guest.connect()).read(0, 8) == evil.image.read_bytes()[:4096]
        left = list(devices.runtime_directory.parent.rglob("*"))
        assert {path.name: path.lstat().st_mode & 0o077 for path in left} == dict.fromkeys(
            (each.name for each in left), 0
        )
    assert await disk.terminate() == 75
    assert evil.done() == dict.fromkeys(("probe", "open", "map"), possible), evil.results()
    assert all(set(each) == ATTEMPTS for each in evil.results().values())


async def test_the_environment_switches_it_off(
    devices: Devices, evil: EvilDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAPFS_SANDBOX", "off")
    disk = await devices.serve(evil.image, "r")
    assert (await disk.ask("status"))["sandbox"] == "off"
    assert evil.done()["open"] == ATTEMPTS
