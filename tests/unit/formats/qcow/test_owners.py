"""A qcow image two of whose entries refer to one cluster is only read."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

import tapfs
from tapfs import ErrorKind, ImageError
from tapfs.driver import OpenRequest
from tapfs.formats.qcow import FORMAT, owners
from tapfs.kernel.references import EngineCounter
from tapfs.testing.model import MemoryFile
from tests.qcow_images import KINDS, cksum, l1_range, make
from tests.scattered_images import scattered_qcow

SIZE = 8 << 20


def word(file: MemoryFile, at: int) -> int:
    return int.from_bytes(file.data[at : at + 8], "big")


def put(file: MemoryFile, at: int, number: int) -> None:
    file.data[at : at + 8] = number.to_bytes(8, "big")


def used(file: MemoryFile, start: int, stop: int) -> list[int]:
    """Where the words are that are not zero."""
    return [at for at in range(start, stop, 8) if word(file, at)]


def refused(file: MemoryFile) -> ImageError:
    with pytest.raises(ImageError, match=r"overlap.*the image can only be read") as caught:
        FORMAT.open(file, OpenRequest(writable=True))
    assert caught.value.kind is ErrorKind.READ_ONLY
    FORMAT.open(file, OpenRequest())
    assert FORMAT.open(file, OpenRequest(lenient=True)).check().corruptions
    return caught.value


def l2_entries(file: MemoryFile) -> list[int]:
    """Where the entries of the first L2 table are that are used."""
    reader = FORMAT.open(file, OpenRequest())
    _, table = next(reader.l1.used())  # type: ignore[attr-defined]
    return used(file, table, table + reader.header.l2_length)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["qemu", "qemu-encrypted", "overlay", "overlay-blktap", "overlay-12byte"])
def test_two_entries_for_one_cluster(kind: str) -> None:
    file = make(kind, SIZE, 1)[0]
    first, second, *_ = l2_entries(file)
    put(file, second, word(file, first))
    assert refused(file).offset == word(file, first)


@pytest.mark.parametrize("kind", ["qemu-compressed", "overlay-compressed"])
def test_two_entries_for_one_compressed_cluster(kind: str) -> None:
    """A rewrite of one would leave a hole in the other."""
    file = make(kind, SIZE, 1)[0]
    first, second, *_ = (at for at in l2_entries(file) if word(file, at) >> 63)
    put(file, second, word(file, first))
    refused(file)


@pytest.mark.parametrize("kind", ["qemu", "blktap"])
def test_two_entries_for_one_table(kind: str) -> None:
    """In blktap's own layout L1 alone gives the clusters."""
    file = make(kind, SIZE, 1)[0]
    start, end = l1_range(file.data)
    first, second, *_ = used(file, start, end)
    put(file, second, word(file, first))
    if kind == "blktap":
        file.data[52:56] = cksum(file.data[start:end])
        assert FORMAT.open(file, OpenRequest()).fast_path  # type: ignore[attr-defined]
    refused(file)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_of_image_may_be_written(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = make(kind, SIZE, 2)[0]
    FORMAT.open(file, OpenRequest(writable=True))
    monkeypatch.setattr(owners, "Survey", lambda *_: type("Odd", (), {"complete": False}))
    FORMAT.open(file, OpenRequest(writable=True))


def test_two_of_millions_of_entries(tmp_path: Path) -> None:
    """Images of a size that was once not looked at."""
    path = tmp_path / "a"
    clusters = 1 << 22
    scattered_qcow(path, clusters << 12, [0, clusters - 1, *range(1, clusters - 1, 4999)], cluster_bits=12)
    tapfs.open(path, writable=True).close()
    with path.open("r+b") as file:
        file.seek(48)
        table = int.from_bytes(file.read(8), "big")
        file.seek(table)
        first = file.read(8)
        file.seek(48 + 8 * (clusters // 512 - 1))
        file.seek(int.from_bytes(file.read(8), "big") + 8 * 511)
        file.write(first)
    with pytest.raises(ImageError, match="overlap") as caught:
        tapfs.open(path, writable=True)
    assert (caught.value.kind, caught.value.offset) == (ErrorKind.READ_ONLY, int.from_bytes(first, "big"))


@pytest.mark.parametrize("kind", ["qemu", "qemu-compressed"])
def test_two_of_a_few_entries_in_several_windows(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine marks them here. A payload may share its cluster with others, a plain cluster with nothing."""
    file = make(kind, SIZE, 1)[0]
    path = tmp_path / "a"
    path.write_bytes(file.data)
    monkeypatch.setattr(owners, "OWNED_BITS", 3)
    tapfs.open(path, writable=True).close()
    first, second, *_ = (at for at in l2_entries(file) if not word(file, at) >> 63)
    put(file, second, word(file, first))
    path.write_bytes(file.data)
    with pytest.raises(ImageError, match=r"overlap.*the image can only be read"):
        tapfs.open(path, writable=True)


@pytest.mark.parametrize("room", [50, 1 << 20])
def test_payloads_that_overlap_in_an_image_of_many_tables(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine sorts them, in parts of the file where it has no room for all."""
    monkeypatch.setattr(owners, "MAX_ODD_TABLE_BYTES", 0)
    monkeypatch.setattr(EngineCounter, "MOST_PAYLOADS", room)
    file = make("qemu-compressed", SIZE, 1)[0]
    path = tmp_path / "a"
    path.write_bytes(file.data)
    tapfs.open(path, writable=True).close()
    packed = [at for at in l2_entries(file) if word(file, at) >> 63]
    places = sorted((word(file, at) & (1 << 63 - 13) - 1, at) for at in packed)
    near = [(place, at, following) for (place, at), (following, _) in pairwise(places) if following - place < 8191]
    assert len(near) > 5
    for place, at, following in (near[0], near[-1]):
        before = word(file, at)
        for length, overlaps in ((following - place, False), (following - place + 1, True)):
            put(file, at, 1 << 63 | length << 63 - 13 | place)
            path.write_bytes(file.data)
            if not overlaps:
                tapfs.open(path, writable=True).close()
                continue
            with pytest.raises(ImageError, match="overlap") as caught:
                tapfs.open(path, writable=True)
            assert (caught.value.kind, caught.value.offset) == (ErrorKind.READ_ONLY, following)
        put(file, at, before)
