"""QEMU's published cases about chains, copies and data files, as tests of tapfs: 061, 063, 098, 122, 176, 191, 244."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

import tapfs as tapfs_package
from tapfs import CopyOptions, ErrorKind, ImageError
from tapfs.kernel.engine import EngineDisk
from tests.conftest import Ran
from tests.qcow2_images import by_hand
from tests.unit.formats.qcow2.cases.small_images import CLUSTER, clean, new, put, raw, require

Run = Callable[..., Ran]

MIB = 1 << 20


def own_extents(path: Path) -> list[tuple[int, int, str]]:
    """What an image itself holds: offset and length in clusters, and the kind."""
    with tapfs_package.open(path) as disk:
        mapped = disk.layers[0].driver.map(0, disk.size)
    return [(each.offset // CLUSTER, each.length // CLUSTER, each.kind.name) for each in mapped]


@pytest.mark.parametrize("snapshot", [False, True])
@pytest.mark.parametrize("parent", [False, True])
def test_061_zeros_reach_an_image_of_version_2_as_data_or_as_nothing(
    tmp_path: Path, *, snapshot: bool, parent: bool
) -> None:
    """Version 2 has no zeros. What version 3 calls zeros is copied so that no parent shows."""
    base = raw(tmp_path / "base", 0x2A, 64 * CLUSTER) if parent else None
    path = new(tmp_path / "image", 64 * CLUSTER, base)
    with tapfs_package.open(path, writable=True) as disk:
        disk.write_zeroes(0, 32 * CLUSTER)
        if snapshot:
            disk.flush()
    if snapshot:
        tapfs_package.create_snapshot(path, "foo")
        put(path, (0x42, 0, 32 * CLUSTER))
    target = tmp_path / "target"
    with tapfs_package.open(path, snapshot="foo" if snapshot else None) as disk:
        tapfs_package.convert(
            disk,
            target,
            target_format="qcow2",
            backing=None if base is None else str(base),
            backing_format=None if base is None else "raw",
            options={"compat": "0.10", "cluster_size": str(CLUSTER)},
        )
    require(target, (0, 0, 32 * CLUSTER), (0x2A if parent else 0, 32 * CLUSTER, 32 * CLUSTER))
    assert "ZERO" not in {kind for _, _, kind in own_extents(target)}
    clean(target)


def test_063_a_copy_into_a_disk_that_is_there(tapfs: Run, tmp_path: Path) -> None:
    path, other = new(tmp_path / "image", 64 * CLUSTER), tmp_path / "other"
    put(path, (1, 0, CLUSTER), (2, 33 * CLUSTER, CLUSTER))
    assert tapfs("convert", "-n", "-f", "qcow2", "-O", "qcow2", path, other).code != 0
    assert not other.exists()
    new(other, 64 * CLUSTER)
    put(other, (9, 0, 64 * CLUSTER))
    assert tapfs("convert", "-n", "-f", "qcow2", "-O", "qcow2", path, other).code == 0
    assert tapfs("compare", path, other).code == 0
    clean(other)
    small = new(tmp_path / "small", 32 * CLUSTER)
    before = small.read_bytes()
    assert tapfs("convert", "-n", "-f", "qcow2", "-O", "qcow2", path, small).code != 0
    assert small.read_bytes() == before


#: The plans of that commit: of the base, of the overlay that is emptied.
PLANS = 2


@pytest.mark.parametrize("call", range(1, PLANS + 2))
def test_098_a_commit_that_fails_at_any_plan_is_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """The host refuses one of the plans of the commit, up to the emptying of the overlay."""
    base = new(tmp_path / "base", 64 * CLUSTER)
    path = new(tmp_path / "image", 64 * CLUSTER, base)
    put(path, (1, 0, 4 * CLUSTER), (2, 40 * CLUSTER, CLUSTER))
    calls = 0
    execute = EngineDisk.execute

    def failing(engine: EngineDisk, plan: Any) -> None:
        nonlocal calls
        calls += bool(plan)
        if calls == call:
            raise ImageError(ErrorKind.IO, "the host says no", path=str(path), op="write")
        execute(engine, plan)

    with monkeypatch.context() as patch:
        patch.setattr(EngineDisk, "execute", failing)
        with nullcontext() if call > PLANS else pytest.raises(ImageError, match="the host says no"):
            tapfs_package.commit(path)
        assert call > calls if call > PLANS else calls >= call
    pieces = ((1, 0, 4 * CLUSTER), (2, 40 * CLUSTER, CLUSTER), (0, 4 * CLUSTER, 36 * CLUSTER))
    require(path, *pieces)
    for each in (base, path):
        assert tapfs_package.check(each).corruptions == 0
    tapfs_package.commit(path)
    require(path, *pieces)
    require(base, *pieces)
    assert own_extents(path) == [(0, 64, "UNALLOCATED")]


@pytest.mark.parametrize("zeros", ["written", "said", "none"])
def test_122_a_copy_over_the_same_parent_has_what_differs(tmp_path: Path, zeros: str) -> None:
    """Zeros of the overlay stay zeros over the parent; what the overlay has not stays with the parent."""
    base = new(tmp_path / "base", 64 * CLUSTER)
    put(base, (0x11, 0, 64 * CLUSTER))
    path = new(tmp_path / "image", 64 * CLUSTER, base)
    put(path, (0x22, 16 * CLUSTER, 8 * CLUSTER))
    with tapfs_package.open(path, writable=True) as disk:
        if zeros == "written":
            disk.write(0, bytes(8 * CLUSTER))
        elif zeros == "said":
            disk.write_zeroes(0, 8 * CLUSTER)
    target = tmp_path / "target"
    tapfs_package.convert(
        path,
        target,
        target_format="qcow2",
        backing=str(base),
        backing_format="qcow2",
        options={"cluster_size": str(CLUSTER)},
    )
    require(target, (0x11 if zeros == "none" else 0, 0, 8 * CLUSTER), (0x11, 8 * CLUSTER, 8 * CLUSTER))
    require(target, (0x22, 16 * CLUSTER, 8 * CLUSTER), (0x11, 24 * CLUSTER, 40 * CLUSTER))
    own = [(start, length) for start, length, kind in own_extents(target) if kind != "UNALLOCATED"]
    assert sum(length for _, length in own) == (8 if zeros == "none" else 16)
    clean(target)


def test_122_a_copy_over_a_parent_that_is_shorter(tmp_path: Path) -> None:
    """Behind the parent's end nothing is allocated for zeros, even where they cannot be said."""
    base = new(tmp_path / "base", 64 * CLUSTER)
    put(base, (0x11, 60 * CLUSTER, 4 * CLUSTER))
    path = new(tmp_path / "image", 2048 * CLUSTER, base)
    put(path, (0x22, 1500 * CLUSTER, CLUSTER))
    target = tmp_path / "target"
    options = {"compat": "0.10", "cluster_size": str(CLUSTER)}
    tapfs_package.convert(
        path, target, target_format="qcow2", backing=str(base), backing_format="qcow2", options=options
    )
    assert [each for each in own_extents(target) if each[2] != "UNALLOCATED"] == [(1500, 1, "DATA")]
    require(target, (0x11, 60 * CLUSTER, 4 * CLUSTER), (0x22, 1500 * CLUSTER, CLUSTER))


@pytest.mark.parametrize("compressed", [False, True])
def test_122_several_sources_become_one_disk(tapfs: Run, tmp_path: Path, *, compressed: bool) -> None:
    """Their ends lie inside clusters of the target: 1023 KiB each, clusters of 4 KiB there."""
    size = 1023 << 10
    sources = [new(tmp_path / f"{number}", size, cluster_size="1024") for number in (1, 2, 3)]
    pieces = [(0x11, 16 << 10, 16 << 10), (0x22, 130 << 10, 130 << 10), (0x33, 1022 << 10, 1024)]
    for number, source in enumerate(sources):
        put(source, *((byte + number, at, length) for byte, at, length in pieces))
    target = tmp_path / "target"
    words = ["-c"] if compressed else []
    ran = tapfs("convert", *words, "-O", "qcow2", "-o", f"cluster_size={CLUSTER}", *sources, target)
    assert (ran.code, ran.err) == (0, "")
    for number in range(3):
        require(target, *((byte + number, number * size + at, length) for byte, at, length in pieces))
        require(target, (0, number * size, 16 << 10), (0, number * size + (32 << 10), 98 << 10))
    clean(target)
    assert tapfs("convert", "-O", "qcow2", "-B", sources[0], "-F", "qcow2", *sources, tmp_path / "no").code != 0


@pytest.mark.parametrize("compressed", [False, True])
def test_122_zeros_that_are_not_looked_for_are_written(tmp_path: Path, *, compressed: bool) -> None:
    path = new(tmp_path / "image", 64 * CLUSTER)
    put(path, (0x22, 0, 8 * CLUSTER), (0, 8 * CLUSTER, 8 * CLUSTER))
    target = tmp_path / "target"
    options = {"cluster_size": str(CLUSTER)}
    tapfs_package.convert(
        path,
        target,
        target_format="qcow2",
        compressed=compressed,
        options=options,
        copying=CopyOptions(sparse_bytes=0),
    )
    require(target, (0x22, 0, 8 * CLUSTER), (0, 8 * CLUSTER, 56 * CLUSTER))
    assert compressed or own_extents(target) == [(0, 64, "DATA")]
    clean(target)


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("parent", [False, True])
def test_122_zeros_into_a_disk_that_is_there(tapfs: Run, tmp_path: Path, compat: str, *, parent: bool) -> None:
    """An empty target stays small, unless only data can hide what its parent has."""
    source = new(tmp_path / "source", 64 * CLUSTER)
    base = raw(tmp_path / "base", 0x55, 64 * CLUSTER) if parent else None
    target = new(tmp_path / "target", 64 * CLUSTER, base, compat=compat)
    assert tapfs("convert", "-n", "-O", "qcow2", source, target).code == 0
    require(target, (0, 0, 64 * CLUSTER))
    kinds = {kind for _, _, kind in own_extents(target)}
    assert kinds == {("DATA" if compat == "0.10" else "ZERO") if parent else "UNALLOCATED"}
    clean(target)


@pytest.mark.parametrize("inside", ["a snapshot", "a bitmap"])
@pytest.mark.parametrize("way", ["emptied", "base named", "kept", "two levels down"])
def test_176_a_commit_of_an_overlay_with_a_snapshot_or_a_bitmap(tmp_path: Path, way: str, inside: str) -> None:
    """Around 2 GiB, where a number of 32 bits has its sign.

    A snapshot of the overlay shows the base, too, which the commit would change under it: that is refused, unlike QEMU.
    """
    size, end = 2100 * MIB, 1 << 31
    base = new(tmp_path / "base", size, cluster_size="65536")
    put(base, (1, end - 0x30000, 0x30000))
    middle = new(tmp_path / "itmd", size, base, cluster_size="65536")
    put(middle, (2, end - 0x20000, 0x20000))
    top = new(tmp_path / "top", size, middle, cluster_size="65536")
    if inside == "a snapshot":
        tapfs_package.create_snapshot(top, "snap")
    else:
        tapfs_package.add_bitmap(top, "b")
    put(top, (3, end - 0x10000, 0x10000))
    before = [each.read_bytes() for each in (base, middle, top)]
    options: dict[str, Any] = {
        "kept": {"keep": True},
        "base named": {"base": middle},
        "two levels down": {"base": base},
    }
    if inside == "a snapshot":
        with pytest.raises(ImageError, match="has snapshots"):
            tapfs_package.commit(top, **options.get(way, {}))
        assert [each.read_bytes() for each in (base, middle, top)] == before
        return
    tapfs_package.commit(top, **options.get(way, {}))
    pieces = ((1, end - 0x30000, 0x10000), (2, end - 0x20000, 0x10000), (3, end - 0x10000, 0x10000))
    for each in (top, base if way == "two levels down" else middle):
        require(each, *pieces)
    assert way == "two levels down" or base.read_bytes() == before[0]
    with tapfs_package.open(top) as disk:
        own = any(each.kind.name == "DATA" for each in disk.layers[0].driver.map(end - 0x10000, 0x10000))
    assert own == (way != "emptied")
    assert [each.consistent for each in tapfs_package.bitmaps(top)] == [True]
    for each in (base, middle, top):
        report = tapfs_package.check(each)
        assert (report.corruptions, report.leaks) == (0, 0)


def test_191_two_overlays_over_an_image_that_is_committed(tmp_path: Path) -> None:
    """Both read the same afterwards, over the emptied image and over its base."""
    base = new(tmp_path / "base", 64 * CLUSTER)
    middle = new(tmp_path / "mid", 64 * CLUSTER, base)
    put(middle, (0x55, 16 * CLUSTER, CLUSTER))
    tops = [new(tmp_path / name, 64 * CLUSTER, middle) for name in ("top", "ovl2")]
    last = new(tmp_path / "ovl3", 64 * CLUSTER, tops[1])
    put(tops[0], (0x66, 0, CLUSTER))
    tapfs_package.commit(middle, write_base=True)
    require(base, (0x55, 16 * CLUSTER, CLUSTER))
    for turn in range(2):
        require(tops[0], (0x66, 0, CLUSTER), (0x55, 16 * CLUSTER, CLUSTER))
        for each in (tops[1], last):
            require(each, (0, 0, CLUSTER), (0x55, 16 * CLUSTER, CLUSTER))
        if turn == 0:
            for each in tops:
                tapfs_package.rebase(each, str(base), new_formats=["qcow2"], unsafe=True)
            middle.unlink()


# -- 244: guest data in a file of its own ---------------------------------------------------------------


def outside(folder: Path, size: int = 64 * CLUSTER, **options: str) -> Path:
    tapfs_package.create(
        folder / "image", "qcow2", size, options={"cluster_size": str(CLUSTER), "data_file": "outside"} | options
    )
    return folder / "image"


def test_244_an_image_does_not_open_without_its_data_file(tmp_path: Path) -> None:
    path = outside(tmp_path)
    put(path, (1, 0, CLUSTER))
    (tmp_path / "outside").rename(tmp_path / "away")
    with pytest.raises(ImageError) as raised, tapfs_package.open(path) as disk:
        disk.read(0, 1)
    assert raised.value.kind is ErrorKind.NOT_FOUND
    assert "outside" in str(raised.value)
    with pytest.raises(ImageError):
        tapfs_package.open(path, writable=True)


def test_244_nothing_is_compressed_into_a_data_file(tapfs: Run, tmp_path: Path) -> None:
    source = new(tmp_path / "source", 64 * CLUSTER)
    put(source, (0x11, 0, 32 * CLUSTER))
    target = tmp_path / "image"
    ran = tapfs("convert", "-c", "-O", "qcow2", "-o", "data_file=outside", source, target)
    assert ran.code != 0
    assert not target.exists()
    ran = tapfs("convert", "-O", "qcow2", "-o", "data_file=outside", source, target)
    assert (ran.code, ran.err) == (0, "")
    assert tapfs("compare", source, target).code == 0
    with pytest.raises(ImageError, match="another file"):
        tapfs_package.create_snapshot(target, "test")


@pytest.mark.parametrize("raw_too", ["off", "on"])
def test_244_discards_and_zeros_in_a_data_file(tmp_path: Path, raw_too: str) -> None:
    """Nothing, data, discarded, zeros over that, zeros over data, zeros over nothing: 8 clusters each.

    A data file that is a raw disk by itself reads the same by itself wherever the image does not call it discarded.
    """
    path = outside(tmp_path, data_file_raw=raw_too)
    before = path.stat().st_size
    with tapfs_package.open(path, writable=True) as disk:
        disk.write(8 * CLUSTER, b"\x11" * 32 * CLUSTER)
        disk.discard(16 * CLUSTER, 16 * CLUSTER)
        disk.write_zeroes(24 * CLUSTER, 24 * CLUSTER)
        shown = disk.read(0, disk.size)
    assert shown[: 16 * CLUSTER] == bytes(8 * CLUSTER) + b"\x11" * 8 * CLUSTER
    assert shown[24 * CLUSTER :] == bytes(40 * CLUSTER)
    assert path.stat().st_size <= before + 2 * CLUSTER, "no data is in the image"
    data = (tmp_path / "outside").read_bytes().ljust(len(shown), b"\0")
    assert by_hand(path.read_bytes(), outside=data) == shown
    if raw_too == "on":
        assert data[: 16 * CLUSTER] == shown[: 16 * CLUSTER]
        assert data[24 * CLUSTER :] == shown[24 * CLUSTER :]
    report = tapfs_package.check(path)
    assert (report.corruptions, report.leaks) == (0, 0)
