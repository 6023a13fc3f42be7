"""Mutants: the places of a file that are changed, one at a time."""

from __future__ import annotations

from pathlib import Path

from tests.torture.mutation import TARGETS, mutants, mutated, of_file

_PROGRAM = """
def move(size, limit):
    if size < limit:
        write(size + 8)
    return f"{size}" + "bytes"
"""


def test_each_place_is_changed_once(tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(_PROGRAM)
    changed = {mutated(path.read_bytes(), each).decode() for each in of_file(path)}
    assert changed == {
        _PROGRAM.replace("size < limit", "size <= limit"),
        _PROGRAM.replace("size < limit", "(not (size < limit))"),
        _PROGRAM.replace("size + 8", "size - 8"),
        _PROGRAM.replace("size + 8", "size + 9"),
        _PROGRAM.replace("write(size + 8)", "pass"),
    }


def test_every_target_has_mutants() -> None:
    assert all(mutants(TARGETS[name]._replace(files=TARGETS[name].files[:1])) for name in ("vdi", "write_path"))
