"""A qcow image two of whose entries refer to one cluster is only read."""

from __future__ import annotations

import pytest

from tapfs import ErrorKind, ImageError
from tapfs.driver import OpenRequest
from tapfs.formats.qcow import FORMAT, owners
from tapfs.testing.model import MemoryFile
from tests.qcow_images import KINDS, cksum, l1_range, make

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
    monkeypatch.setattr(owners, "Survey", lambda *_: type("Odd", (), {"doubled": False, "complete": False}))
    FORMAT.open(file, OpenRequest(writable=True))


def test_an_image_of_many_tables_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    file = make("qemu", SIZE, 1)[0]
    first, second, *_ = l2_entries(file)
    put(file, second, word(file, first))
    monkeypatch.setattr(owners, "MAX_ODD_TABLE_BYTES", 0)
    refused(file)  # all of it is plain
    monkeypatch.setattr(owners, "MAX_TABLE_BYTES", 0)
    FORMAT.open(file, OpenRequest(writable=True))
