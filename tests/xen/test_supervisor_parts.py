"""Parts of the supervisor: restarts, disk processes and their locks, the lock of the one, what systemd gets."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tapfs.errors import ErrorKind, ImageError
from tapfs.serving import service_manager
from tapfs.serving.processes import process_start
from tapfs.xen import process_handle, runtime_files
from tapfs.xen.supervisor import install, page_merging
from tapfs.xen.supervisor.restarts import Restarts
from tapfs.xen.supervisor.supervisor_lock import take_supervisor_lock


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TAPFS_RUNTIME_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_the_first_restart_comes_at_once_and_the_fifth_not_at_all() -> None:
    restarts = Restarts()
    assert [restarts.after_crash(100.0 + number) for number in range(5)] == [0.0, 1.0, 2.0, 4.0, None]


def test_crashes_are_forgotten_after_a_minute() -> None:
    restarts = Restarts()
    assert [restarts.after_crash(number * 61.0) for number in range(10)] == [0.0] * 10
    for number in range(4):
        assert restarts.after_crash(1000.0 + 15 * number) is not None
    assert restarts.after_crash(1060.5) is not None  # the first of them is a minute old


async def test_a_running_process_is_adopted_by_name(sleeper: subprocess.Popen[bytes]) -> None:
    found = process_handle.adopt(f"{sleeper.pid}:{process_start(sleeper.pid)}")
    assert found is not None
    assert found.pid == sleeper.pid
    assert found.name == f"{sleeper.pid}:{process_start(sleeper.pid)}"
    found.send(signal.SIGKILL)
    with trio.fail_after(30):
        assert await found.ended() is None
    sleeper.wait()
    found.send(signal.SIGKILL)  # it does not matter that it is gone
    found.close()


@pytest.mark.parametrize("name", [None, "", "x:y", "1", "12:", f"{os.getpid()}:1", "4194304999999999999999:1", "-1:5"])
def test_another_process_is_not_adopted(name: str | None) -> None:
    assert process_handle.adopt(name) is None


def test_a_locked_device_keeps_its_files(tmp_path: Path) -> None:
    for suffix in ("socket", "journal"):
        (tmp_path / f"3-51712.{suffix}").touch()
    (tmp_path / "blktapctrl.lock").touch()
    assert runtime_files.keys_of_runtime_files(tmp_path) == {"3-51712"}
    with (tmp_path / "3-51712.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert not runtime_files.remove_runtime_files(tmp_path, "3-51712")
        assert (tmp_path / "3-51712.journal").exists()
    assert runtime_files.remove_runtime_files(tmp_path, "3-51712")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["blktapctrl.lock"]


def test_the_supervisors_lock_names_its_holder() -> None:
    holder = take_supervisor_lock()
    with pytest.raises(ImageError, match=rf"by process {os.getpid()}; ") as caught:
        take_supervisor_lock()
    assert caught.value.kind is ErrorKind.LOCKED
    os.close(holder)
    os.close(take_supervisor_lock())
    assert runtime_files.directory().stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("abstract", [True, False])
def test_systemd_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, abstract: bool) -> None:
    name = f"tapfs-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}" if abstract else name)
    service_manager.notify("READY=1")  # nobody listens: nothing happens
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0{name}" if abstract else name)
        service_manager.notify("READY=1")
        assert manager.recv(100) == b"READY=1"
    monkeypatch.delenv("NOTIFY_SOCKET")
    service_manager.notify("READY=1")


def test_the_unit_and_the_script_are_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binaries = tmp_path / "venv %n/bin"
    binaries.mkdir(parents=True)
    (binaries / "block-tapfs").touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(binaries / "python"))
    for _ in range(2):  # again, over what is there
        unit, script = (Path(path) for path in install.install(str(tmp_path / "root")))
    assert script == tmp_path / "root/etc/xen/scripts/block-tapfs"
    assert script.readlink() == binaries / "block-tapfs"
    assert unit == tmp_path / "root/usr/lib/systemd/system/tapfs-blktapctrl.service"
    lines = unit.read_text().splitlines()
    # systemd reads %n as its own word.
    assert f"ExecStart='{tmp_path}/venv %%n/bin/python' -P -m tapfs.cli blktapctrl" in lines
    for line in ("Type=notify", "Restart=always", "KillMode=process", "RestartPreventExitStatus=15"):
        assert line in lines
    # systemd-analyze security says 4.1 of 10.
    for line in ("NoNewPrivileges=yes", "PrivateNetwork=yes", "PrivateMounts=no", "MemoryDenyWriteExecute=yes"):
        assert line in lines
    kept = next(line for line in lines if line.startswith("CapabilityBoundingSet="))
    assert kept.count("CAP_") == len(install.CAPABILITIES)
    assert not {"CAP_SYS_PTRACE", "CAP_SYS_RAWIO", "CAP_NET_ADMIN"}.intersection(kept.split("=")[1].split())


def test_an_installation_needs_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ImageError) as caught:
        install.install(str(tmp_path / "root"))
    assert caught.value.kind is ErrorKind.NOT_FOUND
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    ("before", "wish", "after"), [("0", None, "1"), ("0", "0", "0"), ("1", None, "1"), ("2", "1", "2")]
)
def test_equal_pages_are_merged_unless_somebody_has_said_no(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, wish: str | None, after: str
) -> None:
    monkeypatch.delenv(page_merging.VARIABLE, raising=False)
    if wish is not None:
        monkeypatch.setenv(page_merging.VARIABLE, wish)
    switch = tmp_path / "run"
    switch.write_text(f"{before}\n")
    page_merging.merge_equal_pages(switch)
    assert switch.read_text().strip() == after
    page_merging.merge_equal_pages(tmp_path / "a kernel without")
