"""Folders in which everybody may make files."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def sticky() -> Iterator[Path]:
    """A folder like /tmp: everybody may make files in it and remove only those of their own."""
    assert os.geteuid() == 0, "run the suite as root: tests as another user need it"
    folder = Path(tempfile.mkdtemp(prefix="tapfs-test-", dir="/tmp"))
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)
