"""The parent of an image among the names that the image gives, and the identity that the parent must have."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

import tapfs
from tapfs import ErrorKind, Gate, ImageError
from tapfs.disk import probe
from tapfs.driver import BackingReference, Driver, Geometry, HostFile, OpenRequest
from tapfs.extent import Extent, Kind

SIZE = 65536


class LinkDriver:
    """An image without data: lines "id NAME", "parent NAME", "other NAME", "wants ID" after its magic."""

    format_name = "link"

    def __init__(self, file: HostFile) -> None:
        text = file.read(0, 4096).replace(b"\0", b"").decode()
        lines = [line.split(" ", 1) for line in text.splitlines()[1:] if " " in line]
        self.identities = frozenset(value for word, value in lines if word == "id")
        names = [value for word, value in lines if word in ("parent", "other")]
        wanted = next((value for word, value in lines if word == "wants"), None)
        backing = BackingReference(names[0], None, tuple(names[1:]), wanted) if names else None
        self.geometry = Geometry(virtual_size=SIZE, granule=512, map_unit=SIZE, backing=backing)

    def map(self, offset: int, length: int) -> list[Extent]:
        del offset, length
        return [Extent(0, SIZE, Kind.UNALLOCATED)]

    def details(self) -> Mapping[str, object]:
        return {}


class LinkFormat:
    name = "link"

    def probe(self, head: bytes, size: int) -> int:
        del size
        return 100 if head.startswith(b"LINK\n") else 0

    def probe_tail(self, tail: bytes, size: int) -> int:
        return 100 if tail.endswith(b"\nLINKED") and size > 6 else 0

    def open(self, file: HostFile, request: OpenRequest) -> Driver:
        del request
        return LinkDriver(file)


FORMAT = LinkFormat()


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], str]]:
    caches = (probe.format_named, probe._trailed_formats)
    monkeypatch.setitem(probe._MODULES, "link", __name__)
    for cached in caches:
        cached.cache_clear()

    def make(name: str, text: str) -> str:
        (tmp_path / name).write_text("LINK\n" + text)
        return str(tmp_path / name)

    yield make
    for cached in caches:  # what they keep is not of the next test
        cached.cache_clear()


def raw(path: Path, byte: bytes) -> None:
    path.write_bytes(byte * SIZE)


def test_a_further_name_is_taken_where_the_first_leads_nowhere(
    image: Callable[[str, str], str], tmp_path: Path
) -> None:
    raw(tmp_path / "here.raw", b"h")
    child = image("child", "parent C:\\gone.raw\nother here.raw\nother also.raw\n")
    with tapfs.open(child, backing_formats=["raw"]) as disk:
        assert disk.read(0, 4) == b"hhhh"


def test_the_first_name_counts_where_both_are_there(image: Callable[[str, str], str], tmp_path: Path) -> None:
    raw(tmp_path / "a.raw", b"a")
    raw(tmp_path / "b.raw", b"b")
    with tapfs.open(image("child", "parent a.raw\nother b.raw\n"), backing_formats=["raw"]) as disk:
        assert disk.read(0, 1) == b"a"


def test_a_missing_parent_is_named_by_its_first_name(image: Callable[[str, str], str]) -> None:
    with pytest.raises(ImageError, match=r"gone\.raw is missing") as caught:
        tapfs.open(image("child", "parent gone.raw\nother too.raw\n"))
    assert caught.value.kind is ErrorKind.NOT_FOUND


def test_a_name_outside_the_roots_is_no_way_round_the_gate(image: Callable[[str, str], str], tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    raw(tmp_path / "outside.raw", b"o")
    raw(inside / "parent.raw", b"i")
    child = image("inside/child", f"parent {tmp_path}/outside.raw\nother parent.raw\n")
    with pytest.raises(ImageError) as caught:
        tapfs.open(child, backing_formats=["raw"], gate=Gate.inside(inside))
    assert caught.value.kind is ErrorKind.DENIED


def test_a_parent_of_another_identity_is_refused(image: Callable[[str, str], str]) -> None:
    image("parent", "id uuid:2\n")
    child = image("child", "parent parent\nwants uuid:1\n")
    with pytest.raises(ImageError, match="uuid:1, and that file is uuid:2") as caught:
        tapfs.open(child, backing_formats=["link"])
    assert caught.value.kind is ErrorKind.CORRUPT
    assert "any_parent=True" in str(caught.value)
    with tapfs.open(child, backing_formats=["link"], any_parent=True) as disk:
        assert len(disk.layers) == 2
    image("parent", "id uuid:2\nid uuid:1\n")
    with tapfs.open(child, backing_formats=["link"]) as disk:
        assert len(disk.layers) == 2


def test_a_parent_that_has_no_identity_is_taken(image: Callable[[str, str], str], tmp_path: Path) -> None:
    raw(tmp_path / "plain.raw", b"p")
    with tapfs.open(image("child", "parent plain.raw\nwants uuid:1\n"), backing_formats=["raw"]) as disk:
        assert disk.read(0, 1) == b"p"


def test_a_format_is_found_by_the_end_of_the_file(image: Callable[[str, str], str], tmp_path: Path) -> None:
    image("unused", "")
    path = tmp_path / "tailed"
    path.write_bytes(b"\0" * 8192 + b"\nLINKED")
    with tapfs.open(str(path)) as disk:
        assert disk.format_name == "link"
