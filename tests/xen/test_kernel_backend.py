"""xen-blkback is loaded beside disks that run: a folder stands in for sysfs, and a script for modprobe."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from tapfs.xen import kernel_backend
from tapfs.xen.device import Device
from tapfs.xen.kernel_backend import load_kernel_backend
from tapfs.xen.xenstore.client import XenStore
from tests.xen import libxl

OURS = Device("vbd", 1, 51712)
OTHER = Device("vbd", 1, 51728)


@pytest.fixture
def bus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The bus of backends, with two disks and a network card. modprobe notes whether the bus looks for drivers."""
    bus = tmp_path / "xen-backend"
    for name in ("drivers", "devices/vbd-1-51712", "devices/vbd-1-51728", "devices/vif-1-0/driver"):
        (bus / name).mkdir(parents=True)
    (bus / "drivers_autoprobe").write_text("1")
    program = tmp_path / "modprobe"
    program.write_text(
        f"#!/bin/sh\ncp {bus}/drivers_autoprobe {bus}/then; echo $* >{bus}/words; mkdir {bus}/drivers/vbd\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(kernel_backend, "_BUS", bus)
    return bus


async def test_it_takes_none_of_the_disks_that_run(bus: Path, store: XenStore) -> None:
    await libxl.add_disk(store, OURS, "tap:qcow:/images/a.qcow")
    await libxl.add_disk(store, OTHER, "/dev/loop0", script="/etc/xen/scripts/block")
    await load_kernel_backend(store)
    assert (bus / "words").read_text().split() == ["-q", "xen-blkback"]
    assert (bus / "then").read_text() == "0"
    assert (bus / "drivers_autoprobe").read_text() == "1"
    assert (bus / "drivers_probe").read_text() == "vbd-1-51728"


async def test_it_is_loaded_once(bus: Path, store: XenStore) -> None:
    (bus / "drivers/vbd").mkdir()
    await load_kernel_backend(store)
    assert not (bus / "words").exists()


async def test_the_bus_looks_for_drivers_again_where_modprobe_fails(
    bus: Path, store: XenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "modprobe").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    await load_kernel_backend(store)
    assert (bus / "drivers_autoprobe").read_text() == "1"
    assert "cannot load xen-blkback" in caplog.text


async def test_a_kill_while_it_is_loaded_leaves_a_bus_that_looks_for_drivers(bus: Path, tmp_path: Path) -> None:
    program, go_on = tmp_path / "modprobe", tmp_path / "go-on"
    os.mkfifo(go_on)
    program.write_text(f"#!/bin/sh\ntouch {bus}/begun; read line <{go_on}; mkdir {bus}/drivers/vbd\n")
    code = "import sys, pathlib, tapfs.xen.kernel_backend as it; it._BUS = pathlib.Path(sys.argv[1]); it._load()"
    with subprocess.Popen([sys.executable, "-c", code, bus]) as supervisor:
        await until((bus / "begun").exists)
        assert (bus / "drivers_autoprobe").read_text() == "0"
        supervisor.kill()
    go_on.write_text("now\n")
    await until(lambda: (bus / "drivers_autoprobe").read_text() == "1")


async def until(happened: Callable[[], bool]) -> None:
    with trio.fail_after(60):
        while not happened():
            await trio.sleep(0.01)
