"""The line that shows a served disk: what its process says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tapfs.errors import ErrorKind, ImageError
from tapfs.serving import served_disks
from tapfs.serving.served_record import ServedRecord


@pytest.mark.parametrize(
    ("status", "summary"),
    [
        ({"paused": False, "waiting": None}, "ready"),
        ({"paused": True, "waiting": None}, "paused"),
        ({"paused": False, "waiting": "/srv/disk: cannot write"}, "waiting: /srv/disk: cannot write"),
        (None, "does not answer"),
    ],
)
def test_the_summary_says_how_a_disk_is(
    status: dict[str, Any] | None, summary: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    record = ServedRecord(1, 1, 0, "vhost-user", ("/run/disk.sock",), "", "/srv/disk", "raw", "w")

    def answer(_directory: Path, _name: str, command: str, **_details: object) -> dict[str, Any]:
        if status is None:
            raise ImageError(ErrorKind.NOT_FOUND, "is gone", op="ask")
        return status if command == "status" else {}

    def found(_text: str) -> tuple[Path, ServedRecord]:
        return tmp_path, record

    monkeypatch.setattr(served_disks, "ask_and_block", answer)
    monkeypatch.setattr(served_disks, "find_record", found)
    assert served_disks.look_at("/run/disk.sock").summary == summary
