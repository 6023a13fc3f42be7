"""Detaching a block device, with others in the place of its process and of the kernel: what is asked and told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

import pytest

from tapfs.errors import ErrorKind, ImageError
from tapfs.ublk import attaching
from tapfs.ublk import record as records
from tapfs.ublk.attaching import UnservedError
from tapfs.ublk.record import DiskRecord, process_name


class Device:
    """The process of a device and the kernel's driver: what they were asked, in order."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.status: dict[str, object] = {"paused": False, "waiting": None}
        self.flush_error: ImageError | None = None
        self.unserved: ImageError | None = None
        #: How often that is the answer; None: always.
        self.unserved_times: int | None = None

    def ask(self, number: int, command: str, *_words: object, **_details: object) -> dict[str, Any]:
        assert number == 0
        if command == "status":
            if self.unserved is not None and self.unserved_times != 0:
                if self.unserved_times is not None:
                    self.unserved_times -= 1
                raise self.unserved
            return self.status
        self.asked.append(command)
        if command == "flush" and self.flush_error is not None:
            raise self.flush_error
        return {}

    def stop(self, _number: int) -> None:
        self.asked.append("stop")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_words: object) -> None:
        pass


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Device:
    made = Device()
    record = DiskRecord(0, "/srv/disk", "token", process=process_name(os.getpid()))

    def ended(*_words: object) -> None:
        made.asked.append("ended")

    def ending(_number: int) -> None:
        made.asked.append("end")

    def found(_number: int) -> DiskRecord:
        return record

    def no_file(*_words: object, **_details: object) -> None:
        return None

    monkeypatch.setattr(attaching, "ask", made.ask)
    monkeypatch.setattr(attaching, "Driver", lambda: made)
    monkeypatch.setattr(attaching, "require_record", found)
    monkeypatch.setattr(attaching, "_hold", no_file)
    monkeypatch.setattr(attaching, "_await_end", ended)
    monkeypatch.setattr(attaching, "_end_processes", ending)
    monkeypatch.setattr(attaching, "_SUCCESSOR_SECONDS", 0)
    monkeypatch.setattr(attaching, "_PAUSE_SECONDS", 0)
    monkeypatch.setattr(records, "directory", lambda: tmp_path)
    return made


def test_all_is_flushed_before_the_device_goes(device: Device) -> None:
    device.status["paused"] = True
    attaching.detach(0, force=False)
    assert device.asked == ["resume", "flush", "stop", "ended"]


def test_a_device_whose_users_wait_stays(device: Device) -> None:
    device.status["waiting"] = "/srv/disk: cannot write: no space"
    with pytest.raises(ImageError, match="its users wait: /srv/disk: cannot write") as raised:
        attaching.detach(0, force=False)
    assert raised.value.kind is ErrorKind.LOCKED
    assert "--force" in str(raised.value)
    assert device.asked == []


def test_force_gives_users_their_errors_before_it_waits_for_what_they_wrote(device: Device) -> None:
    device.status["waiting"] = "/srv/disk: cannot write: no space"
    attaching.detach(0, force=True)
    assert device.asked == ["give_up", "flush", "stop", "ended"]


@pytest.mark.parametrize("force", [False, True])
def test_an_image_that_cannot_be_flushed_keeps_its_device_unless_it_is_forced(device: Device, *, force: bool) -> None:
    device.flush_error = ImageError(ErrorKind.IO, "cannot flush", path="/srv/disk", op="flush")
    with pytest.raises(ImageError, match="what was written last is lost" if force else "cannot flush") as raised:
        attaching.detach(0, force=force)
    assert raised.value.kind is ErrorKind.IO
    assert "/srv/disk: cannot flush" in str(raised.value)  # not "cannot detach": it is the image
    assert device.asked == (["give_up", "flush", "stop", "ended"] if force else ["flush"])


def test_a_device_whose_image_cannot_be_opened_goes_by_force_and_does_not_come_again(device: Device) -> None:
    device.unserved = UnservedError(ErrorKind.NOT_FOUND, "no process serves it now", path="/dev/ublkb0", op="ask")
    with pytest.raises(ImageError, match="no process serves it now"):
        attaching.detach(0, force=False)
    assert device.asked == []
    with pytest.raises(ImageError, match="what was written last is lost"):
        attaching.detach(0, force=True)
    assert device.asked == ["end", "stop", "ended"]


@pytest.mark.parametrize(
    ("kind", "message"),
    [(ErrorKind.NOT_FOUND, "no process serves it now"), (ErrorKind.IO, "its process ended before it had answered")],
)
def test_force_waits_for_the_successor_of_a_killed_process(
    device: Device, monkeypatch: pytest.MonkeyPatch, kind: ErrorKind, message: str
) -> None:
    monkeypatch.setattr(attaching, "_SUCCESSOR_SECONDS", 600)
    device.unserved, device.unserved_times = UnservedError(kind, message, path="/dev/ublkb0", op="ask"), 3
    attaching.detach(0, force=True)
    assert device.asked == ["give_up", "flush", "stop", "ended"]  # nobody was killed, and nothing is lost


def test_the_plan_of_a_device_without_a_server_outlives_it(device: Device, tmp_path: Path) -> None:
    device.unserved = UnservedError(ErrorKind.NOT_FOUND, "no process serves it now", path="/dev/ublkb0", op="ask")
    (tmp_path / "0.plan").write_bytes(b"what was answered")
    with pytest.raises(ImageError, match="is kept in ") as raised:
        attaching.detach(0, force=True)
    records.remove_files(0)  # what the end of the device does
    (kept,) = tmp_path.iterdir()
    assert kept.read_bytes() == b"what was answered"
    assert str(kept) in str(raised.value)


def test_a_plan_file_that_holds_no_plan_is_not_kept(device: Device, tmp_path: Path) -> None:
    device.unserved = UnservedError(ErrorKind.NOT_FOUND, "no process serves it now", path="/dev/ublkb0", op="ask")
    (tmp_path / "0.plan").write_bytes(bytes(4096))
    with pytest.raises(ImageError, match="is lost: /dev/ublkb0: no process serves it now"):
        attaching.detach(0, force=True)
    records.remove_files(0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("plan", [False, True])
def test_force_says_what_is_lost_of_a_device_without_any_process(
    device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, plan: bool
) -> None:
    if plan:
        (tmp_path / "0.plan").write_bytes(b"what was answered")
    monkeypatch.setattr(attaching, "require_record", lambda _number: DiskRecord(0, "/srv/disk", "token"))
    monkeypatch.setattr(attaching, "_hold", lambda *_words, **_details: os.open(os.devnull, os.O_RDONLY))
    with pytest.raises(ImageError, match=r"what was written last is lost.*: no process serves it now") as raised:
        attaching.detach(0, force=True)
    assert raised.value.kind is ErrorKind.NOT_FOUND
    assert [str(each) in str(raised.value) for each in tmp_path.glob("*.plan-kept")] == [True] * plan
    assert device.asked == ["stop", "ended"]


def test_nothing_is_lost_of_a_device_that_has_no_block_device_and_no_plan(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attaching, "require_record", lambda _number: DiskRecord(0, "/srv/disk", "token"))
    attaching.detach(0, force=True)
    assert device.asked == ["stop", "ended"]


@pytest.mark.parametrize("lost", [False, True])
def test_what_is_lost_is_said_of_a_device_that_its_users_keep_open(
    device: Device, monkeypatch: pytest.MonkeyPatch, *, lost: bool
) -> None:
    def kept_open(*_words: object) -> None:
        raise ImageError(ErrorKind.LOCKED, "goes when its users close it", path="/dev/ublkb0", op="detach")

    monkeypatch.setattr(attaching, "_await_end", kept_open)
    if lost:
        device.flush_error = ImageError(ErrorKind.IO, "cannot flush", path="/srv/disk", op="flush")
    with pytest.raises(ImageError, match="goes when its users close it") as raised:
        attaching.detach(0, force=True)
    assert raised.value.kind is ErrorKind.LOCKED
    assert ("what was written last is lost: /srv/disk: cannot flush" in str(raised.value)) == lost


#: A process that says "ready", and on SIGTERM "in order", or nothing if it is deaf.
_SERVER = """
import os, signal, sys
def end(*_words):
    os.write(1, b"in order\\n")  # a print may be under way
    sys.exit()
signal.signal(signal.SIGTERM, signal.SIG_IGN if sys.argv[-1] == "deaf" else end)
os.write(1, b"ready\\n")
while True:
    signal.pause()
"""


@pytest.mark.parametrize(("how", "said", "code"), [("obeys", "in order\n", 0), ("deaf", "", -signal.SIGKILL)])
def test_a_process_ends_in_order_if_it_can(monkeypatch: pytest.MonkeyPatch, how: str, said: str, code: int) -> None:
    monkeypatch.setattr(attaching, "_END_SECONDS", 600 if how == "obeys" else 0)
    command = [sys.executable, "-c", _SERVER, "tapfs.ublk.process", "0", how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        record = DiskRecord(0, "/srv/disk", "token", process=process_name(server.pid))
        monkeypatch.setattr(attaching, "require_record", lambda _number: record)
        attaching._end_processes(0)
        assert (server.stdout.read(), server.wait()) == (said, code)


#: A keeper: says "ready" when its child, the server, does, and on SIGTERM "in order".
_KEEPER = """
import signal, subprocess, sys
def end(*_words):
    child.kill()
    print("in order", flush=True)
    sys.exit()
signal.signal(signal.SIGTERM, end)
child = subprocess.Popen([sys.executable, "-c", *sys.argv[1:]], stdout=subprocess.PIPE)
child.stdout.readline()
print("ready", flush=True)
while True:
    signal.pause()
"""


def test_a_keeper_is_known_by_its_child(monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", _KEEPER, _SERVER, "tapfs.ublk.process", "0", "obeys"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as keeper:
        assert keeper.stdout is not None
        assert keeper.stdout.readline() == "ready\n"
        record = DiskRecord(0, "/srv/disk", "token", keeper=process_name(keeper.pid))
        monkeypatch.setattr(attaching, "require_record", lambda _number: record)
        attaching._end_processes(0)
        assert (keeper.stdout.read(), keeper.wait()) == ("in order\n", 0)


@pytest.mark.parametrize("role", ["process", "keeper"])
def test_a_process_that_does_not_serve_the_device_is_left_alone(monkeypatch: pytest.MonkeyPatch, role: str) -> None:
    monkeypatch.setattr(attaching, "_KEEPER_SECONDS", 0)
    command = [sys.executable, "-c", _SERVER, "tapfs.ublk.process", "1", "obeys"]  # of another device
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        record = DiskRecord(0, "/srv/disk", "token", **{role: process_name(other.pid)})  # type: ignore[arg-type]
        monkeypatch.setattr(attaching, "require_record", lambda _number: record)
        try:
            with pytest.raises(ImageError, match=f"names process {other.pid}, which does not serve it"):
                attaching._end_processes(0)
        finally:
            other.kill()
        assert (other.stdout.read(), other.wait()) == ("", -signal.SIGKILL)  # not "in order"
