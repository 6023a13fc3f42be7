"""Detaching a block device, with others in the place of its process and of the kernel: what is asked and told."""

from __future__ import annotations

import os
from typing import Any, Self

import pytest

from tapfs.errors import ErrorKind, ImageError
from tapfs.ublk import attaching
from tapfs.ublk.record import DiskRecord, process_name


class Device:
    """The process of a device and the kernel's driver: what they were asked, in order."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.status: dict[str, object] = {"paused": False, "waiting": None}
        self.flush_error: ImageError | None = None
        self.unserved: ImageError | None = None

    def ask(self, number: int, command: str, *_words: object, **_details: object) -> dict[str, Any]:
        assert number == 0
        if command == "status":
            if self.unserved is not None:
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
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
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
    device.unserved = ImageError(ErrorKind.NOT_FOUND, "no process serves it now", path="/dev/ublkb0", op="ask")
    with pytest.raises(ImageError, match="no process serves it now"):
        attaching.detach(0, force=False)
    assert device.asked == []
    with pytest.raises(ImageError, match="what was written last is lost"):
        attaching.detach(0, force=True)
    assert device.asked == ["end", "stop", "ended"]
