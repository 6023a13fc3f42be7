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


_C_PROGRAM = """
/* Move 1 byte: a < b. */
static bool move(size_t size, size_t limit)
{
    if (size < limit) {
        write_all(size + 8u, "a < b");
        done |= true;
    }
    return size > 0 && size != limit;
}
"""


def test_each_place_of_c_is_changed_once(tmp_path: Path) -> None:
    path = tmp_path / "program.c"
    path.write_text(_C_PROGRAM)
    changed = {mutated(path.read_bytes(), each).decode() for each in of_file(path)}
    assert changed == {
        _C_PROGRAM.replace("size < limit", "size <= limit"),
        _C_PROGRAM.replace("size < limit", "!(size < limit)"),
        _C_PROGRAM.replace("size + 8u", "size - 8u"),
        _C_PROGRAM.replace("size + 8u", "size + 9u"),
        _C_PROGRAM.replace('write_all(size + 8u, "a < b");', ";"),
        _C_PROGRAM.replace("done |= true", "done &= true"),
        _C_PROGRAM.replace("done |= true;", ";"),
        _C_PROGRAM.replace("size > 0", "size >= 0"),
        _C_PROGRAM.replace("size > 0", "size > 1"),
        _C_PROGRAM.replace("0 && size", "0 || size"),
        _C_PROGRAM.replace("size != limit", "size == limit"),
    }


def test_every_target_has_mutants() -> None:
    assert all(
        mutants(TARGETS[name]._replace(files=TARGETS[name].files[:1])) for name in ("vdi", "write_path", "engine")
    )
