"""Commands over a file whose name promises a format that its contents do not show."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]

TOLD = "nothing in the file shows that format"


@pytest.mark.parametrize("words", [("convert", "-O", "raw"), ("map",), ("dd",), ("hash",), ("measure",)])
def test_a_command_that_takes_it_for_raw_says_so(tapfs: Run, tmp_path: Path, words: tuple[str, ...]) -> None:
    path = tmp_path / "lost.qcow2"
    path.write_bytes(b"garbage!" * 512)
    names = {"convert": (path, tmp_path / "new"), "dd": (f"if={path}", f"of={tmp_path / 'new'}")}
    arguments = (*words[1:], *names.get(words[0], (path,)))
    told = tapfs(words[0], *arguments).err.splitlines()[0]
    assert told.startswith(f"tapfs: {path}: the name ends in .qcow2")
    assert TOLD in told
    for new in (tmp_path / "new", tmp_path / "lost.qcow2.tapfs-hash"):
        new.unlink(missing_ok=True)
    assert TOLD not in tapfs(words[0], "-f", "raw", *arguments).err


def test_a_parent_without_its_header_is_told_of(tapfs: Run, tmp_path: Path) -> None:
    base, path = tmp_path / "base.vmdk", tmp_path / "over.qcow"
    base.write_bytes(bytes(1 << 20))
    assert tapfs("create", "-f", "qcow", "-b", base, "-F", "raw", path) == (0, "", "")
    assert TOLD in tapfs("compare", path, path).err
    assert TOLD not in tapfs("dd", "--backing-format", "raw", f"if={path}", f"of={tmp_path / 'new'}").err


def test_a_check_says_why_there_was_nothing_to_check(tapfs: Run, tmp_path: Path) -> None:
    path = tmp_path / "lost.vhdx"
    path.write_bytes(bytes(1 << 20))
    ran = tapfs("check", path)
    assert ran.code == 63
    assert TOLD in ran.out
    assert "a raw image has no metadata" in tapfs("check", "-f", "raw", path).out
