"""The machine's own disk by vhost-user: tests/laboratory/vhost_disk.py has its server, outside of the machine."""

from __future__ import annotations

import itertools
from pathlib import Path

from tests.laboratory.commands import wait_until

_NAME = "lab-vhost-user"
_SHARE = Path("/share")
_kills = itertools.count(1)


def vhost_user_device() -> str:
    """The block device."""
    for folder in Path("/sys/block").glob("vd*"):
        if (folder / "serial").read_text(encoding="ascii").strip("\0\n") == _NAME:
            return f"/dev/{folder.name}"
    raise AssertionError("the machine has no vhost-user disk")


def kill_vhost_user_server() -> None:
    """Have the server killed (kill -9), and wait until another one has started."""
    number = str(next(_kills))
    (_SHARE / "kill-vhost-user").write_text(number, encoding="ascii")
    answer = _SHARE / "killed-vhost-user"
    wait_until("another server", lambda: answer.is_file() and answer.read_text(encoding="ascii") == number, 60)
