"""`block-tapfs`, as xl runs it: what it answers, in xenstore and to the user."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Awaitable, Callable

import pytest
import trio

from tapfs.xen.device import Device
from tapfs.xen.toolstack import block_script
from tests.conftest import REPOSITORY, Ran
from tests.xen.supervisor_process import PATIENCE
from tests.xen.xenstored import Xenstored

Script = Callable[[str, str], Awaitable[Ran]]

DISK = Device("vbd", 3, 51712)


@pytest.fixture
def backend(xenstored: Xenstored) -> str:
    """A backend's directory as xl makes it; nobody has taken it."""
    xenstored.write(f"{DISK.backend}/params", "tap:qcow:/images/disk.qcow")
    xenstored.write(f"{DISK.backend}/state", "1")
    return DISK.backend


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Script:
    """The script, in a thread."""

    async def run(word: str, path: str) -> Ran:
        monkeypatch.setattr(sys, "argv", ["block-tapfs", word])
        monkeypatch.setenv("XENBUS_PATH", path)
        with trio.fail_after(PATIENCE):
            code = await trio.to_thread.run_sync(block_script.main)
        return Ran(code, *capfd.readouterr())

    return run


async def test_a_disk_that_is_ready(script: Script, xenstored: Xenstored, backend: str) -> None:
    xenstored.write(f"{backend}/tapfs/status", "ready")
    assert await script("add", backend) == (0, "", "")
    assert xenstored.read(f"{backend}/hotplug-status") == "connected"
    assert xenstored.read(f"{backend}/hotplug-error") is None


async def test_a_disk_that_becomes_ready(
    script: Script, xenstored: Xenstored, backend: str, nursery: trio.Nursery
) -> None:
    async def serve() -> None:
        for status in ("starting", "ready"):
            await trio.sleep(0.1)
            assert xenstored.read(f"{backend}/hotplug-status") is None
            xenstored.write(f"{backend}/tapfs/status", status)

    nursery.start_soon(serve)
    # udev gives the path relative to the domain's own.
    assert await script("add", backend.removeprefix("/local/domain/0/")) == (0, "", "")
    assert xenstored.read(f"{backend}/hotplug-status") == "connected"


async def test_a_disk_that_cannot_be_served(script: Script, xenstored: Xenstored, backend: str) -> None:
    reason = "/images/disk.qcow: cannot open: No such file or directory"
    xenstored.write(f"{backend}/tapfs/error", reason)
    xenstored.write(f"{backend}/tapfs/status", "failed")
    assert await script("add", backend) == (1, "", f"block-tapfs: {reason}\n")
    assert xenstored.read(f"{backend}/hotplug-status") == "error"
    assert xenstored.read(f"{backend}/hotplug-error") == reason


async def test_a_disk_that_nobody_serves(
    script: Script, xenstored: Xenstored, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_script, "_CLAIM_SECONDS", 0.05)
    code, _, complaint = await script("add", backend)
    assert code == 1
    assert "'tapfs blktapctrl' running?" in complaint
    assert xenstored.read(f"{backend}/hotplug-status") == "error"


async def test_an_image_that_takes_too_long(
    script: Script, xenstored: Xenstored, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_script, "_READY_SECONDS", 0.05)
    xenstored.write(f"{backend}/tapfs/status", "starting")
    code, _, complaint = await script("add", backend)
    assert code == 1
    assert "still not open" in complaint
    assert xenstored.read(f"{backend}/hotplug-status") == "error"


@pytest.mark.parametrize("gone", [True, False])
async def test_a_disk_that_goes(
    script: Script, xenstored: Xenstored, backend: str, nursery: trio.Nursery, *, gone: bool
) -> None:
    closed: list[bool] = []

    async def close() -> None:
        await trio.sleep(0.1)
        closed.append(True)
        if gone:
            xenstored.fire([xenstored.tree.remove(0, backend)])
        else:
            xenstored.write(f"{backend}/state", "6")

    nursery.start_soon(close)
    assert await script("remove", backend) == (0, "", "")
    assert closed


async def test_a_disk_that_does_not_go(
    script: Script, xenstored: Xenstored, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_script, "_GONE_SECONDS", 0.05)
    code, _, complaint = await script("remove", backend)
    assert code == 1
    assert "still in use" in complaint


async def test_a_disk_that_nobody_serves_any_more_can_go(script: Script, xenstored: Xenstored, backend: str) -> None:
    """Neither a supervisor nor a process says that it is closed; the guest has closed."""
    xenstored.write(f"{backend}/tapfs/process", f"{os.getpid()}:1")  # another process has that number by now
    xenstored.write(f"{backend}/frontend", DISK.frontend)
    xenstored.write(f"{DISK.frontend}/state", "6")
    xenstored.write(f"{backend}/state", "5")
    xenstored.write(f"{backend}/online", "0")
    assert await script("remove", backend) == (0, "", "")


async def test_without_xenstored(script: Script, machine: object) -> None:
    code, _, complaint = await script("add", DISK.backend)
    assert code == 1
    assert complaint.startswith("block-tapfs: ")
    assert complaint.count("\n") == 1


@pytest.mark.parametrize("words", [[], ["online"], ["add", "remove"]])
def test_other_words_are_refused(words: list[str]) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tapfs.xen.toolstack.block_script", *words],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        env={"XENBUS_PATH": DISK.backend},
    )
    assert run.returncode == 64
    assert run.stderr.count("\n") == 1


def test_it_is_light() -> None:
    """Xl waits for it at every disk."""
    words = "import sys, tapfs.xen.toolstack.block_script; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", words], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert not {"trio", "cffi", "argparse", "asyncio", "tapfs.cli"} & set(run.stdout.split())
