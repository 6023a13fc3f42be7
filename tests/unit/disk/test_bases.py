"""An image below overlays is not written, and a name that has passed to an image of another format is read as that."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tapfs as api
from tapfs import ErrorKind, ImageError
from tapfs.host.base_marks import note_overlay, overlays_over, take_over_format
from tests.conftest import Ran

MIB = 1 << 20


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.qcow"
    api.create(str(path), "qcow", MIB)
    return path


def overlay_over(base: Path, name: str, backing: str | None = None) -> Path:
    path = base.with_name(name)
    api.create(str(path), "qcow2", backing=backing or str(base), backing_format="qcow")
    return path


def refused(path: Path) -> ImageError:
    with pytest.raises(ImageError) as caught:
        api.open(path, writable=True)
    assert caught.value.kind is ErrorKind.READ_ONLY
    return caught.value


def write(path: Path, **options: bool) -> None:
    with api.open(path, writable=True, **options) as disk:
        disk.write(0, b"x")


def test_a_base_is_not_written_as_long_as_an_overlay_lies_over_it(base: Path) -> None:
    overlay = overlay_over(base, "over.qcow2", backing=base.name)
    error = refused(base)
    assert str(overlay) in str(error)
    assert "write_base=True" in str(error)
    with api.open(base) as disk:
        assert disk.read(0, 1) == b"\0"
    write(overlay)
    overlay.unlink()
    write(base)


def test_who_says_so_writes_it(base: Path) -> None:
    overlay_over(base, "over.qcow2")
    write(base, write_base=True)


def test_a_base_of_a_base_is_not_written(base: Path) -> None:
    middle = overlay_over(base, "middle.qcow2")
    top = base.with_name("top.qcow2")
    api.create(str(top), "qcow2", backing=str(middle), backing_format="qcow2")
    middle_error, base_error = refused(middle), refused(base)
    assert str(top) in str(middle_error)
    assert str(middle) in str(base_error)


def test_an_overlay_that_lies_over_another_image_now_does_not_count(base: Path) -> None:
    overlay = overlay_over(base, "over.qcow2")
    other = base.with_name("other.qcow")
    api.create(str(other), "qcow", MIB)
    overlay.unlink()
    overlay_over(other, "over.qcow2")
    write(base)
    refused(other)


def test_scratch_writes_are_an_overlay_too(base: Path) -> None:
    overlay = base.with_name("scratch.qcow")
    with api.open(base, overlay=overlay) as disk:
        disk.write(0, b"x")
    assert str(overlay) in str(refused(base))
    with api.open(base, overlay=overlay) as disk:
        assert disk.read(0, 1) == b"x"


def test_a_base_is_not_replaced(base: Path) -> None:
    overlay_over(base, "over.qcow2")
    with pytest.raises(ImageError) as caught:
        api.create(str(base), "qcow", MIB, overwrite=True)
    assert "remove it first" in str(caught.value)
    refused(base)


def test_the_oldest_notes_go_where_there_are_many(base: Path) -> None:
    descriptor = os.open(base, os.O_RDONLY)
    try:
        for number in range(50):
            assert note_overlay(descriptor, f"/{number:0100}")
        found = overlays_over(descriptor)
        assert found[0] == f"/{49:0100}"
        assert 10 < len(found) < 50
        assert note_overlay(descriptor, found[3])
        assert overlays_over(descriptor) == [found[3], *found[:3], *found[4:]]
    finally:
        os.close(descriptor)


def test_what_a_file_is_called_of_old_gives_way_to_the_format_that_has_taken_its_name(base: Path) -> None:
    descriptor = os.open(base, os.O_RDWR)
    try:
        take_over_format(descriptor, "qcow", str(base))
    finally:
        os.close(descriptor)
    with api.open(base, format="raw") as disk:
        assert disk.format_name == "qcow"
        assert disk.size == MIB


def test_the_owner_of_a_file_cannot_choose_how_it_is_read(base: Path) -> None:
    """A service that takes the files of strangers as raw must get their bytes, whatever they note on them."""
    os.setxattr(base, "user.tapfs.format", b"qcow")
    with api.open(base, format="raw") as disk:
        assert disk.format_name == "raw"


def test_the_commands_say_which_overlay_and_how_to_write_all_the_same(base: Path, tapfs: Callable[..., Ran]) -> None:
    overlay = overlay_over(base, "over.qcow2")
    source = base.with_name("source.raw")
    source.write_bytes(b"s" * MIB)
    result = tapfs("convert", "-f", "raw", "-n", source, base)
    assert result.code == 16
    assert str(overlay) in result.err
    assert "--write-base" in result.err
    assert tapfs("convert", "-f", "raw", "-n", "--write-base", source, base).code == 0


def test_a_rebase_leaves_the_old_parent_and_keeps_the_new_one(base: Path, tapfs: Callable[..., Ran]) -> None:
    overlay = overlay_over(base, "over.qcow2")
    other = base.with_name("other.qcow")
    api.create(str(other), "qcow", MIB)
    assert tapfs("rebase", "-b", other, "-F", "qcow", overlay).code == 0
    write(base)
    refused(other)


def test_a_commit_writes_its_own_base_and_no_other_overlay_s(base: Path, tapfs: Callable[..., Ran]) -> None:
    overlay = overlay_over(base, "over.qcow2")
    write(overlay)
    assert tapfs("commit", overlay).code == 0
    with api.open(base) as disk:
        assert disk.read(0, 1) == b"x"
    other = overlay_over(base, "other.qcow2")
    result = tapfs("commit", overlay)
    assert result.code == 16
    assert str(other) in result.err


def test_what_changes_no_byte_of_a_disk_minds_no_overlay(base: Path, tapfs: Callable[..., Ran]) -> None:
    path = base.with_name("base.qcow2")
    api.create(str(path), "qcow2", MIB)
    overlay = path.with_name("over.qcow2")
    api.create(str(overlay), "qcow2", backing=str(path), backing_format="qcow2")
    for words in (["snapshot", "-c", "one"], ["bitmap", "--add"], ["bitmap", "--disable"]):
        name = ["b"] if words[0] == "bitmap" else []
        assert tapfs(*words, path, *name).code == 0, words
    refused(path)


def test_every_refusal_names_an_option_that_its_command_takes(base: Path, tapfs: Callable[..., Ran]) -> None:
    path = base.with_name("base.qcow2")
    api.create(str(path), "qcow2", MIB)
    api.create_snapshot(path, "one")
    overlay_path = path.with_name("over.qcow2")
    api.create(str(overlay_path), "qcow2", backing=str(path), backing_format="qcow2")
    for words in (["resize", path, "2M"], ["snapshot", "-a", "one", path], ["compact", path]):
        assert "--write-base" in tapfs(*words).err, words
        assert tapfs(words[0], "--write-base", *words[1:]).code == 0, words


def test_python_says_it_by_a_keyword(base: Path) -> None:
    path = base.with_name("base.qcow2")
    api.create(str(path), "qcow2", MIB)
    api.create_snapshot(path, "one")
    overlay = path.with_name("over.qcow2")
    api.create(str(overlay), "qcow2", backing=str(path), backing_format="qcow2")
    difference = path.with_name("difference")
    api.write_diff(path, path, difference)
    source = path.with_name("source.raw")
    source.write_bytes(bytes(MIB))

    def changes(**options: bool) -> Iterator[Callable[[], object]]:
        yield lambda: api.apply_snapshot(path, "one", **options)
        yield lambda: api.compact(path, **options)
        yield lambda: api.apply(path, difference, **options)
        yield lambda: api.convert(source, path, format="raw", target_format="qcow2", create=False, **options)

    for change in changes():
        with pytest.raises(ImageError, match="write_base=True"):
            change()
    for change in changes(write_base=True):
        change()
