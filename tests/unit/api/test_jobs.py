"""`tapfs.info`, `check`, `repair`, `convert` and `compare` from Python."""

from __future__ import annotations

from pathlib import Path

import pytest

import tapfs
from tapfs import Difference, ErrorKind, ImageError

SIZE = 2 << 20


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"start" + bytes(SIZE - 8) + b"end")
    return path


def test_info_is_what_an_open_image_says(tmp_path: Path, raw: Path) -> None:
    path = tmp_path / "a.qcow"
    tapfs.create(path, "qcow", backing=raw, backing_format="raw")
    found = tapfs.info(path, backing_formats=["raw"])
    with tapfs.open(path, backing_formats=["raw"]) as disk:
        assert found == disk.info
    assert (found["format"], found["virtual_size"], len(found["chain"])) == ("qcow", SIZE, 2)


def test_info_of_an_encrypted_image_needs_no_password(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow"
    tapfs.create(path, "qcow", SIZE, password=b"secret")
    assert tapfs.info(path)["encrypted"]
    assert "partitions" not in tapfs.info(path)
    assert "partitions" in tapfs.info(path, password=b"secret")


def test_convert_makes_a_new_image_and_compare_finds_the_first_difference(tmp_path: Path, raw: Path) -> None:
    target = tmp_path / "disk.qcow"
    seen: list[tuple[int, int]] = []
    tapfs.convert(
        raw,
        target,
        format="raw",
        target_format="qcow",
        compressed=True,
        options={"cluster_size": "8192"},
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (SIZE, SIZE)
    assert tapfs.info(target)["granule"] == 8192
    assert tapfs.compare(raw, target, left_format="raw") is None
    with tapfs.open(target, writable=True) as disk:
        disk.write(12345, b"!")
        assert tapfs.compare(raw, disk, left_format="raw") == Difference(12345)
    assert tapfs.check(target).corruptions == 0
    assert tapfs.repair(target).corruptions == 0


def test_convert_takes_an_open_image_and_leaves_it_open(tmp_path: Path, raw: Path) -> None:
    with tapfs.open(raw, format="raw") as disk:
        tapfs.convert(disk, tmp_path / "a.qcow", target_format="qcow", target_password=b"secret")
        assert disk.read(0, 5) == b"start"
    with tapfs.open(tmp_path / "a.qcow", password=b"secret") as encrypted:
        assert encrypted.read(0, 5) == b"start"


def test_convert_onto_an_existing_disk_writes_zeros_too(tmp_path: Path, raw: Path) -> None:
    target = tmp_path / "target.raw"
    target.write_bytes(b"x" * SIZE)
    inode = target.stat().st_ino
    tapfs.convert(raw, target, format="raw", target_format="raw", create=False)
    assert target.stat().st_ino == inode
    assert target.read_bytes() == raw.read_bytes()
    with pytest.raises(ValueError, match="for new ones"):
        tapfs.convert(raw, target, format="raw", target_format="raw", create=False, compressed=True)
    with pytest.raises(FileExistsError, match="is the source"):
        tapfs.convert(raw, raw, format="raw", target_format="raw", create=False)


def test_only_what_differs_goes_into_an_overlay(tmp_path: Path, raw: Path) -> None:
    changed = tmp_path / "changed.raw"
    changed.write_bytes(b"START" + raw.read_bytes()[5:])
    overlay = tmp_path / "overlay.qcow"
    tapfs.convert(changed, overlay, format="raw", target_format="qcow", backing=str(raw), backing_format="raw")
    with tapfs.open(overlay, backing_formats=["raw"]) as disk:
        assert disk.read(0, SIZE) == changed.read_bytes()
        assert [extent.depth for extent in disk.extents()] == [0, 1]


def test_strict_comparison_wants_equal_sizes(tmp_path: Path, raw: Path) -> None:
    longer = tmp_path / "longer.raw"
    longer.write_bytes(raw.read_bytes() + bytes(512))
    assert tapfs.compare(raw, longer, left_format="raw", right_format="raw") is None
    assert tapfs.compare(raw, longer, left_format="raw", right_format="raw", strict=True) == Difference(None)


def test_what_is_missing_is_a_missing_file(tmp_path: Path) -> None:
    for call in (tapfs.info, tapfs.check, tapfs.repair, tapfs.open_file):
        with pytest.raises(FileNotFoundError):
            call(tmp_path / "missing")
    with pytest.raises(ImageError) as raised:
        tapfs.convert(tmp_path / "missing", tmp_path / "target", target_format="raw")
    assert raised.value.kind is ErrorKind.NOT_FOUND


def test_resize_gives_another_size_and_refuses_to_lose_what_lies_behind(tmp_path: Path) -> None:
    image = tmp_path / "a.qcow2"
    tapfs.create(image, "qcow2", SIZE)
    assert tapfs.resize(image, 2 * SIZE) == 2 * SIZE
    assert tapfs.resize(image, lambda now: now + 512) == 2 * SIZE + 512
    with pytest.raises(ImageError, match="would be lost") as caught:
        tapfs.resize(image, SIZE)
    assert caught.value.kind is ErrorKind.OUT_OF_BOUNDS
    assert tapfs.resize(image, SIZE, shrink=True) == tapfs.info(image)["virtual_size"] == SIZE


def test_amend_changes_what_an_image_says_of_itself(tmp_path: Path) -> None:
    image = tmp_path / "a.qcow2"
    tapfs.create(image, "qcow2", SIZE)
    tapfs.amend(image, {"compat": "0.10"})
    assert image.read_bytes()[7] == 2
    with pytest.raises(ImageError, match="lazy_refcounts=on"):
        tapfs.amend(image, {"lazy_refcounts": "on"})
