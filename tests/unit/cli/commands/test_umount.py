"""`tapfs umount` and `mount` refuse senseless names before they look at anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tapfs.errors import EXIT_USAGE

Run = Callable[..., Any]


@pytest.mark.parametrize("words", [("umount", ""), ("umount", "x", ""), ("mount", "x", "")])
def test_an_empty_name_is_no_directory(
    tapfs: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    """The real path of an empty name is the working directory, which may be a mount."""
    monkeypatch.setenv("TAPFS_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.chdir(tmp_path)
    code, out, err = tapfs(*words)
    assert (code, out) == (EXIT_USAGE, "")
    assert err.startswith("tapfs: error: DIR is empty; see 'tapfs ")
