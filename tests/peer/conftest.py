"""Fixtures of the peer tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.peer.newest_qemu import newest_qemu


@pytest.fixture(params=["the system's QEMU", "the newest QEMU"])
def each_qemu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test with this fixture runs once with the system's QEMU tools and once with those of Debian's backports."""
    if request.param == "the newest QEMU":
        folder = Path(newest_qemu("qemu-img")).parent
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
