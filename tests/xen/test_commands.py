"""The commands about guests' disks, each as a process of its own, with a supervisor and real disk processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import trio

import tapfs
from tapfs.errors import CODES, ErrorKind
from tapfs.xen.toolstack.control_client import ask
from tapfs.xen.xenstore.client import XenStore
from tests.conftest import REPOSITORY, Ran
from tests.json_documents import require_valid_output
from tests.xen import libxl
from tests.xen.blkif import SECTOR
from tests.xen.machine import Machine
from tests.xen.supervising import SIZE, disk, eventually, guest_disk, is_gone, pid_of
from tests.xen.supervisor_process import PATIENCE, SupervisorProcess
from tests.xen.xenbus_frontend import XenbusFrontend
from tests.xen.xenstored import Xenstored

NAMED = ("--domain", "guest", "--vdev", "xvda")


async def tapfs_command(*words: object, cwd: Path = REPOSITORY) -> Ran:
    """`tapfs` as a process of its own."""
    with trio.fail_after(PATIENCE):
        done = await trio.run_process(
            [sys.executable, "-m", "tapfs.cli", *map(str, words)],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            cwd=cwd,
        )
    return Ran(done.returncode, done.stdout.decode(), done.stderr.decode())


async def ok(*words: object, cwd: Path = REPOSITORY) -> str:
    """What a command prints that must work."""
    code, out, err = await tapfs_command(*words, cwd=cwd)
    assert (code, err) == (0, "")
    require_valid_output(list(map(str, words)), out)
    return out


async def listed() -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(await ok("list", "--json"))["attached"]
    return found


async def test_attach_use_and_detach(
    supervised: SupervisorProcess, machine: Machine, xenstored: Xenstored, store: XenStore, image: Path
) -> None:
    # A disk string of a configuration, relative to where the user is.
    await ok("attach", f"tap:sync:{image.name},xvda,w", "--domain", "guest", "--nice", 5, cwd=image.parent)
    assert os.getpriority(os.PRIO_PROCESS, await pid_of(store, disk())) == 5
    (entry,) = await listed()
    assert (entry["domain"], entry["domain_name"], entry["vdev"], entry["mode"]) == (3, "guest", "xvda", "w")
    assert (entry["spec"], entry["status"], entry["paused"]) == (f"tap:raw:{image}", "ready", False)
    assert entry["pid"] == await pid_of(store, disk())
    async with guest_disk(machine, disk()) as driver:
        await trio.to_thread.run_sync(driver.frontend.write, 0, b"x" * 4096)
        await trio.to_thread.run_sync(driver.frontend.read, 0, 16)
        (entry,) = json.loads(await ok("stats", *NAMED, "--json"))
        counted = entry["statistics"]
        assert (counted["writes"], counted["written_bytes"]) == (1, 4096)
        assert (counted["reads"], counted["read_bytes"]) == (1, 8192)
        assert (counted["errors"], counted["in_flight"]) == (0, 0)
        asked = entry["operations"]["operations"]
        assert (asked["write"]["requests"], asked["write"]["bytes"]) == (1, 4096)
        assert (asked["read"]["requests"], asked["read"]["bytes"], asked["read"]["errors"]) == (1, 8192, 0)
        assert f'door="xen",disk="3/xvda",image="{image}",format="raw"' in await ok("stats", "--prometheus")
        header, line = (await ok("stats")).splitlines()
        assert dict(zip(header.split(), line.split(), strict=False))["WRITES"] == "1"
        shown = await ok("list")
        assert shown.startswith("attached:\n  xvda of domain 3 (guest):")
        assert f" tap:raw:{image}\n    w, used, 8 KiB read, 4 KiB written, process " in shown
        async with trio.open_nursery() as nursery:
            nursery.start_soon(driver.close_when_told)
            await ok("detach", "--domain", 3, "--vdev", disk().number)
    assert is_gone(xenstored, disk())
    with tapfs.open(image, format="raw") as raw:
        assert raw.read(0, 4608) == b"x" * 4096 + bytes(512)
    assert await listed() == []
    assert (await ok("stats")).splitlines()[1:] == []


async def test_a_disk_of_domain_0_is_a_block_device(
    supervised: SupervisorProcess, machine: Machine, xenstored: Xenstored, image: Path
) -> None:
    device = disk("xvdh", domain=0)
    outputs: list[str] = []

    async def attach() -> None:
        outputs.append(await ok("attach", image, "-f", "raw", "--domain", 0, "--vdev", "xvdh"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(attach)
        await eventually(lambda: xenstored.read(f"{device.backend}/tapfs/status") == "ready")
        assert outputs == []
        async with guest_disk(machine, device, socket=machine.directory / "xenstored.socket"):
            await eventually(lambda: bool(outputs))
    assert outputs == ["/dev/xvdh\n"]


@pytest.mark.parametrize(
    ("words", "kind", "text"),
    [
        (("missing.raw", *NAMED), ErrorKind.NOT_FOUND, "missing.raw: cannot open"),
        (("disk.raw", *NAMED), ErrorKind.READ_ONLY, "raw"),
        (("disk.raw", "--mode", "r", "--domain", "nobody", "--vdev", "xvda"), ErrorKind.NOT_FOUND, "nobody"),
        (("disk.raw", "--domain", "3", "--vdev", "xv"), ErrorKind.INVALID_ARGUMENT, "'xv'"),
        (("tap:qcow:disk.raw", *NAMED), ErrorKind.INVALID_FORMAT, "disk.raw"),
    ],
)
async def test_what_cannot_be_attached(
    supervised: SupervisorProcess, xenstored: Xenstored, image: Path, words: tuple[str, ...], kind: ErrorKind, text: str
) -> None:
    code, out, err = await tapfs_command("attach", *words, cwd=image.parent)
    assert (code, out) == (CODES[kind].exit_code, "")
    assert err.startswith("tapfs: error: ")
    assert text in err
    assert err.count("\n") == 1
    assert is_gone(xenstored, disk())


async def test_what_a_disk_says_and_f_must_agree(supervised: SupervisorProcess, image: Path) -> None:
    code, _, err = await tapfs_command("attach", f"tap:qcow:{image}", *NAMED, "-f", "raw")
    assert code == 64
    assert "qcow" in err
    code, _, err = await tapfs_command("attach", image, "--domain", "3")
    assert code == 64
    assert "--vdev" in err


async def test_attaching_that_is_interrupted_leaves_nothing(
    xenstored: Xenstored, supervised: SupervisorProcess, image: Path
) -> None:
    words = [sys.executable, "-m", "tapfs.cli", "attach", f"tap:sync:{image}", "--domain", "0", "--vdev", "xvda"]
    async with trio.open_nursery() as nursery:
        run = partial(trio.run_process, words, cwd=REPOSITORY, capture_stderr=True, check=False)
        attaching = await nursery.start(run)
        # It waits for a block device that does not come.
        await eventually(lambda: xenstored.read(f"{disk(domain=0).backend}/tapfs/status") == "ready")
        attaching.send_signal(signal.SIGINT)
    assert attaching.returncode == 130
    assert is_gone(xenstored, disk(domain=0))
    await eventually(lambda: supervised.disk_processes() == {})


async def test_pause_and_resume(supervised: SupervisorProcess, machine: Machine, store: XenStore, image: Path) -> None:
    await ok("attach", f"tap:sync:{image}", *NAMED)
    async with guest_disk(machine, disk()) as driver:
        await ok("pause", *NAMED)
        assert [entry["paused"] for entry in await listed()] == [True]
        driver.frontend.ring.submit(driver.frontend.message(1, 0, driver.frontend.buffer(1).segments(8))[0])
        await trio.sleep(0.2)
        assert driver.frontend.ring.responses() == []
        await ok("resume", *NAMED)
        (response,) = await trio.to_thread.run_sync(driver.frontend.ring.wait, 1)
        assert response.status == 0
        await _detach(driver)


async def test_swap_takes_a_live_snapshot(
    supervised: SupervisorProcess, machine: Machine, store: XenStore, tmp_path: Path
) -> None:
    disk_path, kept = tmp_path / "disk.qcow", tmp_path / "monday.qcow"
    tapfs.create(str(disk_path), "qcow", SIZE)
    await ok("attach", f"tap:qcow:{disk_path}", *NAMED)
    async with guest_disk(machine, disk()) as driver:
        await trio.to_thread.run_sync(driver.frontend.write, 0, b"a" * SECTOR)
        await ok("swap", *NAMED, kept.name, cwd=tmp_path)
        await trio.to_thread.run_sync(driver.frontend.write, 1, b"b" * SECTOR)
        assert await trio.to_thread.run_sync(driver.frontend.read, 0, 2) == b"a" * SECTOR + b"b" * SECTOR
        assert str(disk_path) in str((await listed())[0]["spec"])
        with tapfs.open(kept) as below:
            assert below.read(0, 2 * SECTOR) == b"a" * SECTOR + bytes(SECTOR)
        # Another one of all disks, and the way back, twice.
        assert await ok("swap", "--domain", "guest", "--all", ".all") == f"xvda: {disk_path}.all\n"
        assert await ok("commit", *NAMED) == f"Committed to {disk_path}: 0 bytes of data.\n"
        committed = json.loads(await ok("commit", *NAMED, "--json"))
        assert (committed["base"], committed["data_bytes"], kept.exists()) == (str(disk_path), 4096, False)
        copy = tmp_path / "copy.vhd"
        mirrored = json.loads(await ok("mirror", *NAMED, copy.name, "-O", "vhd", "--json", cwd=tmp_path))
        assert (mirrored["target"], mirrored["pivot"]) == (str(copy), False)
        await _interrupted_mirror(tmp_path / "ended")
        await _detach(driver)
    for path in (disk_path, copy):
        with tapfs.open(path) as opened:
            assert opened.read(0, 2 * SECTOR) == b"a" * SECTOR + b"b" * SECTOR


async def _interrupted_mirror(path: Path) -> None:
    """Ctrl-C ends the job as well as the command, and nothing is left."""
    words = ["mirror", *NAMED, str(path), "-O", "raw", "-r", "1", "--progress", "json"]
    with trio.fail_after(PATIENCE):
        process = await trio.lowlevel.open_process(
            [sys.executable, "-m", "tapfs.cli", *words], cwd=REPOSITORY, stderr=subprocess.PIPE
        )
        assert process.stderr is not None
        await process.stderr.receive_some()  # it is under way
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 130
    with trio.fail_after(PATIENCE):
        while (await ask(disk(), "job"))["job"] is not None:
            await trio.sleep(0.01)
    assert json.loads(await ok("list", "--json"))["attached"][0]["status"] == "ready"
    assert not path.exists()


async def test_resize_is_seen_by_the_guest(
    supervised: SupervisorProcess, machine: Machine, store: XenStore, image: Path
) -> None:
    await ok("attach", f"tap:sync:{image}", *NAMED)
    async with guest_disk(machine, disk()) as driver:
        assert await ok("resize", *NAMED, "2M") == "2097152 bytes (2 MiB)\n"
        await driver.await_sectors(4096)
        code, _, err = await tapfs_command("resize", *NAMED, "1M")
        assert code != 0
        assert "--force" in err
        assert await ok("resize", *NAMED, "1M", "--force") == "1048576 bytes (1 MiB)\n"
        await driver.await_sectors(2048)
        await _detach(driver)


async def test_limit(supervised: SupervisorProcess, xenstored: Xenstored, image: Path) -> None:
    await ok("attach", f"tap:sync:{image}", *NAMED, "--limit-bytes", "1M", "--limit-requests", "100")
    keys = [f"{disk().backend}/tapfs/limit-{what}" for what in ("bytes", "requests")]
    assert [xenstored.read(key) for key in keys] == ["1048576", "100"]
    await ok("limit", *NAMED, "--bytes", "10M")
    assert [xenstored.read(key) for key in keys] == ["10485760", "100"]
    await ok("limit", *NAMED, "--requests", "0")
    assert [xenstored.read(key) for key in keys] == ["10485760", "0"]


async def test_a_guest_that_does_not_let_go_can_be_forced(
    machine: Machine, xenstored: Xenstored, supervised: SupervisorProcess, image: Path
) -> None:
    await ok("attach", f"tap:sync:{image}", *NAMED)
    async with guest_disk(machine, disk()):
        await ok("detach", *NAMED, "--force")
        assert is_gone(xenstored, disk())
        await eventually(lambda: supervised.disk_processes() == {})


async def test_a_disk_of_xl_is_for_xl_to_detach(
    supervised: SupervisorProcess, store: XenStore, xenstored: Xenstored, image: Path
) -> None:
    device = disk(kind="vbd")
    await libxl.add_disk(store, device, f"tap:sync:{image}")
    await eventually(lambda: xenstored.read(f"{device.backend}/tapfs/status") == "ready")
    code, _, err = await tapfs_command("detach", *NAMED)
    assert code == CODES[ErrorKind.UNSUPPORTED].exit_code
    assert "xl block-detach 3 xvda" in err


@pytest.mark.parametrize("command", ["pause", "resume", "detach", "limit --bytes 1", "resize", "swap x.qcow"])
async def test_a_disk_that_is_not_there(supervised: SupervisorProcess, command: str) -> None:
    code, _, err = await tapfs_command(*command.split(), *NAMED)
    assert code == CODES[ErrorKind.NOT_FOUND].exit_code
    assert err == "tapfs: error: domain 3 has no disk xvda that tapfs serves; 'tapfs list' shows them all\n"


async def test_no_wait_returns_at_once(xenstored: Xenstored, supervised: SupervisorProcess, tmp_path: Path) -> None:
    await ok("attach", tmp_path / "missing", *NAMED, "--no-wait")
    await eventually(lambda: xenstored.read(f"{disk().backend}/tapfs/status") == "failed")
    (entry,) = await listed()
    assert (entry["status"], entry["pid"], entry["statistics"]) == ("failed", None, None)
    assert "missing" in str(entry["error"])
    assert "failed" in (await ok("list"))
    await ok("detach", *NAMED)
    assert is_gone(xenstored, disk())


async def test_options_of_attach_are_keys_of_the_device(xenstored: Xenstored, tmp_path: Path) -> None:
    """Nobody serves it: `--no-wait` does not mind."""
    xenstored.introduce(3, "guest")
    options = (
        "-f",
        "qcow",
        "--mode",
        "w!",
        "--direct",
        "--memory",
        "256M",
        "--open-files",
        "100",
        "--nice",
        "-5",
        "--grants",
        "map",
    )
    parents = ("--backing-format", "qcow", "--backing-format", "raw", "--key-file", "key")
    await ok("attach", "a.qcow", *NAMED, "--no-wait", *options, *parents, cwd=tmp_path)
    assert xenstored.read(f"{disk().backend}/params") == str(tmp_path / "a.qcow")
    assert xenstored.read(f"{disk().backend}/mode") == "w!"
    ours = {
        "format": "qcow",
        "direct": "1",
        "memory": str(256 << 20),
        "open-files": "100",
        "grants": "map",
        "nice": "-5",
        "backing-formats": "qcow,raw",
        "key-file": str(tmp_path / "key"),
    }
    assert {name: xenstored.read(f"{disk().backend}/tapfs/{name}") for name in ours} == ours
    assert xenstored.read(f"{disk().backend}/tapfs/limit-bytes") is None


async def test_stats_repeat(supervised: SupervisorProcess, image: Path) -> None:
    await ok("attach", f"tap:sync:{image}", *NAMED)
    words = [sys.executable, "-m", "tapfs.cli", "stats", "--interval", "0.05"]
    async with trio.open_nursery() as nursery:
        run = partial(trio.run_process, words, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        repeating = await nursery.start(partial(run, check=False))
        said = b""
        while said.count(b"xvda") < 2:
            said += await repeating.stdout.receive_some()
        repeating.send_signal(signal.SIGINT)
    assert repeating.returncode == 130


async def _detach(driver: XenbusFrontend) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(driver.close_when_told)
        await ok("detach", *NAMED)
