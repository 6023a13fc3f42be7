"""A sample of `make fuzz`: inputs that atheris makes, and damage by chance for every format."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tapfs.driver import Checkable
from tapfs.formats.vdi.driver import VdiDriver
from tests.fuzz.edits import Numbers, try_one

FORMATS = ["qcow", "qcow2", "vdi", "vhd", "vhdx", "vmdk"]


def test_a_sample_finds_nothing(tmp_path: Path) -> None:
    """Without VHDX, whose images are large."""
    words = [sys.executable, "-m", "tests.fuzz", "--runs", "200", "--corpus", str(tmp_path / "kept")]
    words += ["--only", *(name for name in FORMATS if name != "vhdx"), "--", "-seed=1"]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Done 200 runs" in done.stderr
    assert any((tmp_path / "kept").iterdir())


def test_every_format_is_tried() -> None:
    tried = {try_one(Numbers(seed), FORMATS).split()[0] for seed in range(30)}
    assert tried == set(FORMATS)


def test_what_is_no_image_error_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(self: Checkable, progress: object = None) -> object:
        raise IndexError

    monkeypatch.setattr(VdiDriver, "check", check)
    with pytest.raises(IndexError):
        _try_many()


def _try_many() -> None:
    for seed in range(30):
        try_one(Numbers(seed), ["vdi"])
