"""`convert --bitmaps` and `convert -l` beside qemu-img's: the same bitmaps with the same ranges, the same snapshots."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import tapfs as api
from tests.conftest import Ran
from tests.peer.test_convert import qemu
from tests.peer.test_qcow2_bitmaps import SIZE, by_tapfs, same
from tests.peer.test_qcow2_snapshots import system_qemu

Run = Callable[..., Ran]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image with an enabled and a disabled bitmap, in this order of names: b, a."""
    path = tmp_path / "image.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", path, SIZE)
    qemu("qemu-img", "bitmap", "--add", path, "b")
    qemu("qemu-img", "bitmap", "--add", "-g", "4096", path, "a")
    qemu("qemu-io", "-f", "qcow2", "-c", "write 1M 100k", "-c", "write 30M 3M", path)
    qemu("qemu-img", "bitmap", "--disable", path, "a")
    return path


@pytest.mark.parametrize(
    ("words", "options"), [((), "cluster_size=512"), (("-c",), "extended_l2=on"), ((), "compression_type=zstd")]
)
def test_bitmaps_are_copied(tapfs: Run, image: Path, tmp_path: Path, words: tuple[str, ...], options: str) -> None:
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    assert tapfs("convert", "--bitmaps", *words, "-O", "qcow2", "-o", options, image, ours) == (0, "", "")
    qemu("qemu-img", "convert", "--bitmaps", *words, "-O", "qcow2", "-o", options, image, theirs)
    same(system_qemu, tapfs, ours, ["b", "a"])
    for name in ("b", "a"):
        assert by_tapfs(ours, name) == by_tapfs(theirs, name) == by_tapfs(image, name)
    assert [each.enabled for each in api.bitmaps(ours)] == [each.enabled for each in api.bitmaps(theirs)]
    assert tapfs("compare", image, ours).code == 0


def test_inconsistent_ones_are_left_out_only_if_that_is_said(tapfs: Run, image: Path, tmp_path: Path) -> None:
    api.add_bitmap(image, "c")
    data = bytearray(image.read_bytes())
    directory = data.index(b"\0\0\0\2\1\x10\0\1\0\0\0\0b") - 12
    data[directory + 15] |= 1
    image.write_bytes(data)
    target = tmp_path / "target.qcow2"
    words = ("--bitmaps", "-O", "qcow2", image, target)
    ran = tapfs("convert", *words)
    assert ran.code == 2
    assert "bitmap 'b' is inconsistent: what it says cannot be copied; say --skip-broken-bitmaps" in ran.err
    assert not target.exists()
    qemu("qemu-img", "convert", *words, code=1)
    target.unlink(missing_ok=True)
    ran = tapfs("convert", "--skip-broken-bitmaps", *words)
    assert ran.code == 0
    assert "bitmap 'b' is inconsistent and was left out" in ran.err
    same(system_qemu, tapfs, target, ["a", "c"])


def test_a_format_without_bitmaps_is_refused_before_anything_is_copied(tapfs: Run, image: Path, tmp_path: Path) -> None:
    for words in (("-O", "raw", image, tmp_path / "new"), ("-O", "qcow2", "-f", "raw", image, tmp_path / "new")):
        ran = tapfs("convert", "--bitmaps", *words)
        assert ran.code == 12
        assert "keep no bitmaps" in ran.err
        assert not (tmp_path / "new").exists()


def test_bitmaps_are_copied_into_an_image_that_is_there(tapfs: Run, image: Path, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    for each in (ours, theirs):
        qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", each, SIZE)
        qemu("qemu-img", "bitmap", "--add", each, "own")
    assert tapfs("convert", "-n", "--bitmaps", "-O", "qcow2", image, ours) == (0, "", "")
    qemu("qemu-img", "convert", "-n", "--bitmaps", "-O", "qcow2", image, theirs)
    same(system_qemu, tapfs, ours, ["own", "b", "a"])
    for name in ("b", "a"):
        assert by_tapfs(ours, name) == by_tapfs(theirs, name) == by_tapfs(image, name)
    assert tapfs("compare", image, ours).code == 0


@pytest.mark.parametrize(
    ("options", "size", "code"), [("compat=0.10", SIZE, 12), ("compat=1.1", SIZE, 18), ("compat=1.1", 2 * SIZE, 13)]
)
def test_an_image_that_cannot_take_the_bitmaps_stays_as_it_is(
    tapfs: Run, image: Path, tmp_path: Path, options: str, size: int, code: int
) -> None:
    target = tmp_path / "target.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, target, size)
    if code == 18:
        qemu("qemu-img", "bitmap", "--add", target, "a")
    before = target.read_bytes()
    assert tapfs("convert", "-n", "--bitmaps", "-O", "qcow2", image, target).code == code
    assert target.read_bytes() == before


@pytest.mark.parametrize("words", [("-l", "x"), ("--skip-broken-bitmaps",)])
def test_words_that_do_not_go_together(tapfs: Run, image: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    bitmaps = () if "--skip-broken-bitmaps" in words else ("--bitmaps",)
    assert tapfs("convert", *bitmaps, *words, "-O", "qcow2", image, tmp_path / "new").code == 64


def test_a_snapshot_is_chosen_in_the_words_of_qemu(tapfs: Run, tmp_path: Path) -> None:
    image, ours, theirs = tmp_path / "image.qcow2", tmp_path / "ours", tmp_path / "theirs"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
    for number, name in enumerate(("one", "two"), 1):
        qemu("qemu-io", "-f", "qcow2", "-c", f"write -P {number} 0 64k", image)
        qemu("qemu-img", "snapshot", "-c", name, image)
    for wanted in ("one", "2", "snapshot.id=1", "snapshot.name=two", "snapshot.id=2,snapshot.name=two"):
        assert tapfs("convert", "-l", wanted, "-O", "raw", image, ours).code == 0
        qemu("qemu-img", "convert", "-l", wanted, "-O", "raw", image, theirs)
        assert ours.read_bytes() == theirs.read_bytes()
    assert tapfs("convert", "-l", "snapshot.id=1,snapshot.name=two", "-O", "raw", image, ours).code == 17
    qemu("qemu-img", "convert", "-l", "snapshot.id=1,snapshot.name=two", "-O", "raw", image, theirs, code=1)
