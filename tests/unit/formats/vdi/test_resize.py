"""VDI disks that get another size where the map has no room: the first slots make way for a longer one."""

from __future__ import annotations

import random
import uuid
from collections.abc import Mapping

import pytest

from tapfs.driver import CreateRequest, Driver, HostFile, OpenRequest
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.vdi import FORMAT
from tapfs.formats.vdi import resize as vdi_resize
from tapfs.plan import Plan, Write, plan
from tapfs.testing import resize
from tapfs.testing.model import MemoryFile, read_extents
from tapfs.testing.subject import Subject
from tests.vdi_images import DIFFERENCING, FIXED, NULL, SMALL, VdiImage, by_bytes, make

SIZE = 5 * SMALL + 1536


class TightFormat:
    """VDI images whose slots begin right behind the map."""

    name = "vdi"
    create_options: Mapping[str, str] = {}

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def probe(self, head: bytes, size: int) -> int:
        return FORMAT.probe(head, size)

    def open(self, file: HostFile, request: OpenRequest) -> Driver:
        return FORMAT.open(file, request)

    def create(self, request: CreateRequest) -> Plan:
        file, _ = make(self.kind, request.virtual_size, 1)
        loose = FORMAT.open(file, OpenRequest()).header
        entries = [int.from_bytes(file.read(loose.map_offset + 4 * at, 4), "little") for at in range(loose.blocks)]
        blank = dict.fromkeys(range(loose.allocated), b"")
        link = uuid.UUID(bytes=loose.link.raw)
        type_ = FIXED if self.kind == "fixed" else DIFFERENCING if link != NULL else loose.type
        tight = VdiImage(
            request.virtual_size, entries, blank, type_, SMALL, loose.extra, link=link,
            map_at=512, data_at=512 + 4 * loose.blocks,
        )  # fmt: skip
        return plan([Write(0, 0, tight.content())])


@pytest.mark.parametrize("kind", ["dynamic", "extra", "fixed"])
@pytest.mark.parametrize("seed", range(3))
def test_a_map_that_has_no_room(kind: str, seed: int) -> None:
    subject = Subject(TightFormat(kind), SIZE)
    resize.run(subject, seed, 5)


def test_a_map_that_moves_in_several_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A map of more than a million entries does; a mutant that put the second piece elsewhere had survived."""
    monkeypatch.setattr(vdi_resize, "_PIECE_ENTRIES", 3)
    for seed in range(3):
        resize.run(Subject(TightFormat("dynamic"), SIZE), seed, 5)


@pytest.mark.parametrize("kind", ["dynamic", "extra", "differencing", "differencing-extra", "fixed"])
def test_who_counts_on_the_header_reads_the_same(kind: str) -> None:
    """Slots in use keep numbers below the count, as QEMU and VirtualBox rely on."""
    file, parent = make(kind, SIZE, 3)
    subject = Subject(FORMAT, SIZE)
    choice = random.Random(kind)
    expected = by_bytes(bytes(file.data), parent)
    for _ in range(6):
        size = (
            choice.choice([len(expected) + choice.randrange(9 * SMALL), choice.randrange(1, SIZE)]) // 512 * 512 + 512
        )
        resize.change_size(subject, file, parent, size)
        expected = expected[:size].ljust(size, b"\0")
        assert by_bytes(bytes(file.data), parent) == expected
        assert read_extents(FORMAT.open(file, OpenRequest()), file, 0, size, parent) == expected
        report = FORMAT.open(file, OpenRequest()).check()
        assert (report.corruptions, report.leaks) == (0, 0), report.findings


def test_a_shorter_disk_has_a_shorter_file() -> None:
    file, _ = make("fixed", SIZE, 3)
    assert isinstance(file, MemoryFile)
    before = file.size()
    resize.change_size(Subject(FORMAT, SIZE), file, b"", SMALL)
    assert file.size() == before - 5 * SMALL


def test_an_old_header_keeps_its_size() -> None:
    file, _ = make("old", SIZE, 3)
    driver = FORMAT.open(file, OpenRequest(writable=True))
    with pytest.raises(ImageError, match=r"0\.2") as raised:
        driver.resize(SMALL)  # type: ignore[attr-defined]
    assert raised.value.kind is ErrorKind.UNSUPPORTED
    assert "convert" in str(raised.value.remedy)
