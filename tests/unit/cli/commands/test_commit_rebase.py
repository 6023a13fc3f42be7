"""`tapfs commit` and `tapfs rebase` as an operator uses them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tapfs as api
from tapfs.errors import CODES, ErrorKind

Run = Callable[..., Any]
SIZE = 1 << 20


def chain(folder: Path, *formats: str) -> list[Path]:
    """Images over one another, base first; each holds its number at a place of its own and at one of all."""
    found: list[Path] = []
    for number, name in enumerate(formats):
        path = folder / f"{number}.{name}"
        backing = None if not number else found[-1].name
        backing_format = formats[number - 1] if number else None
        api.create(path, name, SIZE, backing=backing, backing_format=backing_format)
        with api.open(path, format=name, writable=True) as disk:
            disk.write(65536 * (number + 1), bytes([number + 1]) * 65536)
            disk.write(0, bytes([number + 1]) * 1000)
        found.append(path)
    return found


def content(path: Path, name: str | None = None) -> bytes:
    with api.open(path, format=name) as disk:
        return disk.read(0, disk.size)


def test_commit_writes_the_overlay_into_its_base_and_empties_it(tapfs: Run, tmp_path: Path) -> None:
    base, over = chain(tmp_path, "raw", "qcow2")
    before = content(over)
    assert tapfs("commit", over) == (0, f"Committed to {base}: 69632 bytes of data.\n", "")
    assert base.read_bytes() == before == content(over)
    assert all(not extent.present or extent.depth for extent in _extents(over))
    assert tapfs("commit", "-q", over) == (0, "", "")


def _extents(path: Path) -> list[api.MappedExtent]:
    with api.open(path) as disk:
        return list(disk.extents())


def test_a_rate_of_0_is_no_limit(tapfs: Run, tmp_path: Path) -> None:
    base, over = chain(tmp_path, "raw", "qcow2")
    assert tapfs("commit", "-q", "-r", "0", over) == (0, "", "")
    assert base.read_bytes() == content(over)


def test_d_keeps_what_the_overlay_holds(tapfs: Run, tmp_path: Path) -> None:
    base, over = chain(tmp_path, "qcow2", "qcow2")
    before, length = content(over), over.stat().st_size
    done = json.loads(tapfs("commit", "--json", "-d", over).out)
    assert done == {"version": 1, "base": str(base), "data_bytes": 131072, "emptied": False, "invalid": []}
    assert (content(base), content(over), over.stat().st_size) == (before, before, length)


def test_b_names_an_image_further_down(tapfs: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, between, over = chain(tmp_path, "raw", "qcow2", "qcow2")
    before = content(over)
    words = ("commit", "-b")
    ran = tapfs(*words, "1.raw", over)
    assert ran.code == CODES[ErrorKind.INVALID_ARGUMENT].exit_code
    assert "1.raw is not in its backing chain: " in ran.err
    ran = tapfs(*words, base.name, over)  # a relative name starts at the folder of the overlay, too
    assert ran.code == 0
    assert ran.err == f"tapfs: {between} is of no use by itself any more: what is above it was written below it\n"
    assert base.read_bytes() == before == content(over)
    monkeypatch.chdir(tmp_path)
    assert tapfs(*words, "./0.raw", "2.qcow2").code == 0


@pytest.mark.parametrize("more", [{}, {"extended_l2": "on"}])
def test_an_overlay_with_a_data_file_is_emptied_and_the_file_gets_holes(
    tapfs: Run, tmp_path: Path, more: dict[str, str]
) -> None:
    """The data file takes no space afterwards, also where an earlier commit was ended before that."""
    base, over, outside = tmp_path / "base.raw", tmp_path / "over", tmp_path / "outside"
    base.write_bytes(b"base" * (SIZE // 4) + bytes(88 * 4096))
    options = {"data_file": outside.name, **more}
    api.create(over, "qcow2", SIZE + 88 * 4096, backing=base.name, backing_format="raw", options=options)
    with api.open(over, writable=True) as disk:
        disk.write(70_000, b"over" * 50_000)
        disk.write_zeroes(900_000, 90_000)
        disk.write(disk.size - 1000, b"e" * 1000)
    before = content(over)
    assert tapfs("commit", "-q", over) == (0, "", "")
    assert base.read_bytes() == before == content(over)
    assert all(extent.depth == 1 or not extent.present for extent in _extents(over))
    assert (outside.stat().st_blocks, outside.stat().st_size >= SIZE + 88 * 4096) == (0, True)
    assert tapfs("check", "-q", over).code == 0
    outside.write_bytes(b"left" * (SIZE // 4))
    assert tapfs("commit", "-q", over) == (0, "", "")
    assert outside.read_bytes() == bytes(SIZE)


def test_zeros_of_the_overlay_become_zeros_of_the_base(tapfs: Run, tmp_path: Path) -> None:
    base, over = chain(tmp_path, "raw", "qcow2")
    with api.open(over, writable=True) as disk:
        disk.write_zeroes(65536, 65536)
        disk.write(65536 * 5, bytes(65536))
    before = content(over)
    assert tapfs("commit", over).code == 0
    assert base.read_bytes() == before == content(over)


def test_a_parent_shorter_than_the_overlay_hides_what_lies_below(tapfs: Run, tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(b"b" * SIZE)
    api.create(tmp_path / "short.qcow2", "qcow2", SIZE // 2, backing="base.raw", backing_format="raw")
    over = tmp_path / "over.qcow2"
    api.create(over, "qcow2", SIZE, backing="short.qcow2", backing_format="qcow2")
    before = content(over)
    assert before == b"b" * (SIZE // 2) + bytes(SIZE // 2)
    assert tapfs("commit", "-q", "-b", "base.raw", over).code == 0
    assert content(over) == base.read_bytes() == before


@pytest.mark.parametrize("base_format", ["raw", "qcow2"])
def test_a_base_smaller_than_the_overlay_grows(tapfs: Run, tmp_path: Path, base_format: str) -> None:
    (below,) = chain(tmp_path, "raw")
    with below.open("r+b") as file:
        file.seek(SIZE // 2 + 5)
        file.write(b"what the base has hidden from the start")
    base, over = tmp_path / "base", tmp_path / "over.qcow2"
    parent = (below.name, "raw") if base_format == "qcow2" else (None, None)
    api.create(base, base_format, SIZE // 2, backing=parent[0], backing_format=parent[1])
    api.create(over, "qcow2", 2 * SIZE, backing="base", backing_format=base_format)
    with api.open(over, writable=True) as disk:
        disk.write(2 * SIZE - 6, b"ending")
    before = content(over)
    assert tapfs("commit", "-q", over).code == 0
    assert content(over) == before == content(base, base_format)


def test_a_base_that_cannot_grow_is_left_as_it_is(tapfs: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("tapfs.formats.qcow.editable.EditableQcowDriver.resize")
    base, over = tmp_path / "base.qcow", tmp_path / "over.qcow2"
    api.create(base, "qcow", SIZE)
    api.create(over, "qcow2", 2 * SIZE, backing="base.qcow", backing_format="qcow")
    with api.open(over, writable=True) as disk:
        disk.write(0, b"beginning")
    contents = base.read_bytes(), over.read_bytes()
    ran = tapfs("commit", over)
    assert ran.code == CODES[ErrorKind.OUT_OF_BOUNDS].exit_code
    assert "cannot make it larger" in ran.err
    assert (base.read_bytes(), over.read_bytes()) == contents


def test_what_commit_refuses_it_refuses_before_it_changes_anything(
    tapfs: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tapfs.formats.vdi.writer.WritableVdiDriver.can_uncover", False)
    base, over = chain(tmp_path, "vdi", "vdi")
    contents = [path.read_bytes() for path in (base, over)]
    ran = tapfs("commit", over)
    assert ran.code == CODES[ErrorKind.UNSUPPORTED].exit_code
    assert "say -d" in ran.err
    ran = tapfs("commit", base)
    assert ran.code == CODES[ErrorKind.UNSUPPORTED].exit_code
    assert "has no backing file" in ran.err
    assert [path.read_bytes() for path in (base, over)] == contents
    assert tapfs("commit", "-d", over).code == 0
    assert content(base) == content(over)


def test_an_image_in_use_is_not_committed(tapfs: Run, tmp_path: Path) -> None:
    base, over = chain(tmp_path, "raw", "qcow2")
    before = base.read_bytes()
    for path in (base, over):
        with api.open(path, format=path.suffix[1:]):
            ran = tapfs("commit", over)
            assert ran.code == CODES[ErrorKind.LOCKED].exit_code
            assert str(path) in ran.err
    assert base.read_bytes() == before


def test_a_raw_base_must_be_named_so(tapfs: Run, tmp_path: Path) -> None:
    base, over = chain(tmp_path, "raw", "qcow")
    before = base.read_bytes()
    ran = tapfs("commit", over)
    assert ran.code == CODES[ErrorKind.READ_ONLY].exit_code
    assert "--backing-format raw" in ran.err
    assert base.read_bytes() == before
    assert tapfs("commit", "--backing-format", "raw", over).code == 0


@pytest.mark.parametrize("word", ["--image-opts", "--object=secret,id=a"])
@pytest.mark.parametrize("command", [("commit",), ("rebase", "-b", "x")])
def test_words_of_qemu_that_are_not_taken_say_what_is(tapfs: Run, command: tuple[str, ...], word: str) -> None:
    ran = tapfs(*command, word, "image")
    assert ran.code == 64
    assert f"{word.split('=', maxsplit=1)[0]} is not taken: " in ran.err


def test_rebase_keeps_the_disk(tapfs: Run, tmp_path: Path) -> None:
    _, over = chain(tmp_path, "raw", "qcow2")
    other = tmp_path / "other.qcow2"
    api.create(other, "qcow2", SIZE * 2)
    with api.open(other, writable=True) as disk:
        disk.write(65536 * 9, b"other" * 1000)
    before = content(over)
    ran = tapfs("rebase", "-b", "other.qcow2", over)
    assert ran == (0, "Rebased to the backing file other.qcow2: 65536 bytes of data were written.\n", "")
    assert content(over) == before
    with api.open(over) as disk:
        reference = disk.layers[0].driver.geometry.backing
    assert reference is not None
    assert (reference.name, reference.format) == ("other.qcow2", "qcow2")
    assert json.loads(tapfs("rebase", "--json", "-b", "", over).out)["backing"] is None
    other.unlink()
    assert content(over) == before


def test_rebase_u_changes_the_name_alone(tapfs: Run, tmp_path: Path) -> None:
    base, over = chain(tmp_path, "raw", "qcow2")
    before = content(over)
    base.rename(tmp_path / "moved.raw")
    assert tapfs("rebase", "-b", "moved.raw", "-F", "raw", over).code == CODES[ErrorKind.NOT_FOUND].exit_code
    ran = tapfs("rebase", "-u", "-b", "moved.raw", "-F", "raw", over)
    assert ran == (0, "Rebased to the backing file moved.raw: 0 bytes of data were written.\n", "")
    assert content(over) == before
    assert tapfs("rebase", "-u", "-b", "not/there.raw", "-F", "raw", over).code == 0
    assert tapfs("info", over).code != 0 or "missing" in tapfs("info", over).out


def test_an_image_is_not_rebased_onto_itself_or_what_is_above_it(tapfs: Run, tmp_path: Path) -> None:
    base, over = chain(tmp_path, "qcow2", "qcow2")
    contents = [path.read_bytes() for path in (base, over)]
    for unsafe in ((), ("-u",)):
        for image, backing in ((over, over), (base, over)):
            ran = tapfs("rebase", *unsafe, "-F", "qcow2", "-b", backing, image)
            assert ran.code == CODES[ErrorKind.INVALID_ARGUMENT].exit_code
            assert "is the image itself, or lies above it" in ran.err
    assert [path.read_bytes() for path in (base, over)] == contents


def test_an_image_with_snapshots_is_neither_committed_nor_rebased(tapfs: Run, tmp_path: Path) -> None:
    import subprocess

    base, over = chain(tmp_path, "raw", "qcow2")
    subprocess.run(["qemu-img", "snapshot", "-c", "one", over], check=True)
    before = base.read_bytes()
    for words in (("commit",), ("rebase", "-b", ""), ("rebase", "-b", "0.raw", "-F", "raw")):
        ran = tapfs(*words, over)
        assert ran.code == CODES[ErrorKind.UNSUPPORTED].exit_code
        assert "has snapshots" in ran.err
    assert base.read_bytes() == before


def test_a_format_without_names_of_parents_cannot_be_rebased(tapfs: Run, tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(bytes(SIZE))
    ran = tapfs("rebase", "-f", "raw", "-b", "b", "-u", tmp_path / "a.raw")
    assert ran.code == CODES[ErrorKind.UNSUPPORTED].exit_code
    assert "a raw image cannot get another backing file" in ran.err


def test_python_has_both(tmp_path: Path) -> None:
    base, over = chain(tmp_path, "raw", "qcow2")
    before = content(over)
    assert api.rebase(over, "0.raw", new_formats=["raw"]) == api.Rebased("0.raw", 0)
    steps: list[tuple[int, int]] = []
    assert api.commit(over, progress=lambda done, total: steps.append((done, total))).emptied
    assert steps[-1][0] <= steps[-1][1] == SIZE
    assert base.read_bytes() == before
