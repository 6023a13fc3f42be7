"""Unmounting while one server follows another."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tapfs.errors import ImageError
from tapfs.fuse import control, unmounting
from tapfs.fuse.registry import MountEntry, Registry
from tapfs.serving.processes import process_start


def entry_of(keeper: int, *, followed: bool) -> MountEntry:
    """A mount of a keeper, or of a server without one; this process serves it."""
    served = {"server": os.getpid(), "server_start": process_start(os.getpid())} if followed else {}
    start = process_start(keeper)
    assert start is not None
    return MountEntry("image", "raw", "/nowhere", keeper, start, "ro", "native", "now", **served)  # type: ignore[arg-type]


def test_a_server_that_does_not_listen_yet_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failures: list[OSError] = [ConnectionRefusedError(), FileNotFoundError()]
    with subprocess.Popen(["sleep", "60"]) as keeper:

        def asked(*_: object, **__: object) -> control.Unmounted:
            if failures:
                raise failures.pop()
            keeper.kill()
            return control.Unmounted(None)

        monkeypatch.setattr(control, "ask_to_unmount", asked)
        assert unmounting._ask(Registry(tmp_path), entry_of(keeper.pid, followed=True), force=False)
    assert not failures


def test_a_server_without_a_keeper_that_refuses_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: object, **__: object) -> control.Unmounted:
        raise ConnectionRefusedError

    monkeypatch.setattr(control, "ask_to_unmount", asked)
    with pytest.raises(ImageError, match="does not answer"):
        unmounting._ask(Registry(tmp_path), entry_of(os.getpid(), followed=False), force=False)
