"""Ctrl-C in the middle of a write: the range can be written again, and the image is sound."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import tapfs
from tapfs import Image
from tapfs.disk import write_claims, write_path
from tapfs.jobs.create import NewImage, create_image
from tapfs.kernel.writes import window_segments

SIZE = 1 << 20
CLUSTER = 4096

Trace = Callable[[FrameType, str, Any], Any]


class Interrupting:
    """Raise KeyboardInterrupt when a function of the write path begins or ends for the nth time."""

    def __init__(self, countdown: int) -> None:
        self.countdown = countdown

    def trace(self, frame: FrameType, event: str, _: object) -> Trace | None:
        if frame.f_code.co_filename not in (write_path.__file__, write_claims.__file__):
            return None
        if event in ("call", "return"):
            self.countdown -= 1
            if self.countdown == 0:
                raise KeyboardInterrupt
        return self.trace

    def interrupted(self, call: Callable[[], None]) -> bool:
        """Call; whether it was interrupted."""
        before = sys.gettrace()
        sys.settrace(self.trace)
        try:
            call()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False


def in_a_thread(call: Callable[[], None]) -> None:
    """Call in a thread, which must end."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "it waits for a range that nobody gives back"


@pytest.mark.parametrize("backed", [False, True])
@pytest.mark.parametrize("change", ["write", "write_segments", "write_zeroes", "discard"])
def test_an_interrupted_change_does_not_keep_its_range(tmp_path: Path, change: str, *, backed: bool) -> None:
    base = tmp_path / "base"
    base.write_bytes(b"b" * SIZE)

    def prepared(number: int) -> Path:
        path = tmp_path / f"{number}.qcow"
        backing = NewImage("qcow", None, backing=str(base), backing_format="raw") if backed else NewImage("qcow", SIZE)
        create_image(str(path), backing)
        return path

    def changed(disk: Image) -> None:
        if change == "write":
            disk.write(CLUSTER + 100, b"n" * (2 * CLUSTER))
        elif change == "write_segments":
            with window_segments(CLUSTER, b"n" * CLUSTER, [(5, 100), (200, 10)]) as one:
                disk.write_segments(one)
            with window_segments(CLUSTER, b"n" * (8 * CLUSTER), [(0, 10), (CLUSTER, 5), (5 * CLUSTER, 9)]) as several:
                disk.write_segments(several)
        else:
            getattr(disk, change)(CLUSTER, 3 * CLUSTER)

    number = 0
    while True:
        number += 1
        path = prepared(number)
        with tapfs.open(path, writable=True, backing_formats=["raw"]) as disk:
            disk.write(0, b"x" * (2 * CLUSTER) if change in ("write_zeroes", "discard") else b"x")
            interrupted = Interrupting(number).interrupted(lambda disk=disk: changed(disk))  # type: ignore[misc]
            in_a_thread(lambda disk=disk: disk.write(CLUSTER, b"y" * (3 * CLUSTER)))  # type: ignore[misc]
            assert disk.read(CLUSTER, 3 * CLUSTER) == b"y" * (3 * CLUSTER)
            in_a_thread(disk.flush)
        assert tapfs.check(path).corruptions == 0
        path.unlink()
        if not interrupted:
            break
    assert number > 10
