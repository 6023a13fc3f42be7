"""Files of which not everything is here: what a request meets is fetched, once, and nothing else."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tapfs
from tapfs import ErrorKind, ImageError
from tapfs.disk.chain import OpenOptions, layer_of_file
from tapfs.disk.image import Image
from tapfs.disk.opening import open_image_on
from tapfs.host.file import LocalFile
from tapfs.host.presence import Ended, Presence
from tapfs.jobs.convert import convert_to_new
from tapfs.jobs.create import NewImage
from tapfs.kernel.engine import Status
from tests.unit.xen.xen_rings import DOMAIN, Served, new_machine
from tests.xen.blkif import SECTOR
from tests.xen.frontend import Frontend

BLOCK = 4 << 10
SIZE = 1 << 20


class Elsewhere:
    """A file that lies elsewhere, and its copy here, which is empty at first."""

    def __init__(self, folder: Path, source: Path) -> None:
        self.source = source.read_bytes()
        self.fetched: list[tuple[int, int]] = []
        self.failing = False
        self._copy = folder / "copy"
        with self._copy.open("wb") as copy:
            copy.truncate(len(self.source))
        self._writer = os.open(self._copy, os.O_RDWR)
        self._begun: list[tuple[int, int]] = []
        self._over = 0

    def begin(self, offset: int, length: int) -> int:
        self._begun.append((offset, length))
        return len(self._begun) - 1

    def ended(self) -> list[Ended]:
        ended: list[Ended] = []
        stop = len(self._begun)  # others may begin some meanwhile
        # Not in the order in which they were begun.
        for number in reversed(range(self._over, stop)):
            offset, length = self._begun[number]
            error = None
            if self.failing:
                error = ImageError(ErrorKind.IO, "the line is cut", path="elsewhere", offset=offset, op="fetch")
            else:
                self.fetched.append((offset, length))
                os.pwrite(self._writer, self.source[offset : offset + length], offset)
            ended.append(Ended(number, error))
        self._over = stop
        return ended

    def give_up(self, offset: int, length: int) -> None:
        os.pwrite(self._writer, bytes(length), offset)

    def open(self, image_format: str, *, limit_bytes: int | None = None, ahead: bool = False) -> Image:
        file = LocalFile.open(str(self._copy))
        file.presence = Presence(BLOCK, len(self.source), self, limit_bytes=limit_bytes, ahead=ahead)
        options = OpenOptions(format=image_format)
        return open_image_on(layer_of_file(file.path, file, options), options, password=None)

    @property
    def bytes_fetched(self) -> int:
        return sum(length for _, length in self.fetched)


def raw(folder: Path) -> tuple[Path, bytes]:
    content = random.Random(1).randbytes(SIZE + 700)
    (folder / "source").write_bytes(content)
    return folder / "source", content


def qcow(folder: Path, *, compressed: bool = False) -> tuple[Path, bytes]:
    choice = random.Random(2)
    plain = b"".join(choice.choice([bytes(4096), choice.randbytes(16) * 256]) for _ in range(SIZE // 4096))
    (folder / "plain").write_bytes(plain)
    with tapfs.open(folder / "plain", format="raw") as disk:
        convert_to_new(disk, str(folder / "source"), NewImage("qcow", SIZE), compressed=compressed)
    return folder / "source", plain


KINDS: dict[str, tuple[str, Callable[[Path], tuple[Path, bytes]]]] = {
    "raw": ("raw", raw),
    "qcow": ("qcow", qcow),
    "compressed": ("qcow", lambda folder: qcow(folder, compressed=True)),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def opened(kind: str, tmp_path: Path) -> Iterator[tuple[Elsewhere, Image, bytes]]:
    image_format, make = KINDS[kind]
    source, content = make(tmp_path)
    elsewhere = Elsewhere(tmp_path, source)
    with elsewhere.open(image_format) as disk:
        yield elsewhere, disk, content


def test_what_is_read_is_fetched_once(opened: tuple[Elsewhere, Image, bytes]) -> None:
    elsewhere, disk, content = opened
    assert disk.read(500_000, 100) == content[500_000:500_100]
    first = elsewhere.bytes_fetched
    assert 0 < first < SIZE // 4
    assert disk.read(500_000, 100) == content[500_000:500_100]
    assert elsewhere.bytes_fetched == first
    assert disk.read(0, len(content)) == content
    places = [place for start, length in elsewhere.fetched for place in range(start, start + length, BLOCK)]
    assert len(places) == len(set(places))


def test_the_map_of_a_copy_has_no_holes_where_nothing_is_here(opened: tuple[Elsewhere, Image, bytes]) -> None:
    _, disk, content = opened
    for extent in disk.extents():
        if extent.zero:
            assert not any(content[extent.offset : extent.end])


def test_the_engine_alone_says_what_is_missing(tmp_path: Path) -> None:
    elsewhere = Elsewhere(tmp_path, raw(tmp_path)[0])
    with elsewhere.open("raw") as disk:
        outcome = disk.engine_disk.read_into(bytearray(1000), BLOCK - 500)
        assert (outcome.status, outcome.layer, outcome.file) == (Status.FETCH, 0, 0)
        assert (outcome.offset, outcome.length) == (BLOCK - 500, 1000)
        assert elsewhere.fetched == []
        assert disk.whole_file() is None  # nobody may pass it through


def test_a_failure_of_the_fetch_is_the_reader_s_and_passes(opened: tuple[Elsewhere, Image, bytes]) -> None:
    elsewhere, disk, content = opened
    elsewhere.failing = True
    with pytest.raises(ImageError, match="the line is cut"):
        disk.read(0, len(content))
    elsewhere.failing = False
    assert disk.read(0, len(content)) == content


def test_many_readers_fetch_a_block_once(opened: tuple[Elsewhere, Image, bytes]) -> None:
    elsewhere, disk, content = opened
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(disk.read(0, len(content)))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [content] * 6
    places = [place for start, length in elsewhere.fetched for place in range(start, start + length, BLOCK)]
    assert len(places) == len(set(places))


def test_a_native_front_end_parks_what_is_to_be_fetched(opened: tuple[Elsewhere, Image, bytes]) -> None:
    """The mover does not read a copy where there is nothing: the request goes to who can fetch."""
    elsewhere, disk, content = opened
    with (
        new_machine() as machine,
        Frontend(machine.domain(DOMAIN)) as frontend,
        Served(machine, frontend, disk, writable=False, discard=False) as served,
    ):
        for sector in (0, 100, 1000, 2000):
            assert frontend.read(sector, 8) == content[sector * SECTOR : (sector + 8) * SECTOR]
        assert served.parked
    assert elsewhere.fetched


def test_a_writable_file_is_never_such_a_copy(tmp_path: Path) -> None:
    source, _ = raw(tmp_path)
    file = LocalFile.open(str(source), writable=True)
    file.presence = Presence(BLOCK, SIZE, Elsewhere(tmp_path, source))
    options = OpenOptions(format="raw", writable=True)
    with (
        open_image_on(layer_of_file(file.path, file, options), options, password=None) as disk,
        pytest.raises(ImageError, match="say what of a file is here"),
    ):
        disk.read(0, 1)


def test_a_bounded_copy_gives_up_what_came_first_and_no_reader_sees_it_go(kind: str, tmp_path: Path) -> None:
    """Three readers in a copy that holds a quarter: what is given up is zeros in the file, and nobody reads them."""
    image_format, make = KINDS[kind]
    source, content = make(tmp_path)
    elsewhere = Elsewhere(tmp_path, source)
    wrong: list[int] = []
    with elsewhere.open(image_format, limit_bytes=SIZE // 4, ahead=True) as disk:

        def read(seed: int) -> None:
            choice = random.Random(seed)
            for _ in range(150):
                start = choice.randrange(len(content) - 1)
                length = choice.choice((1, 5000, 60_000))
                wanted = content[start : start + length]
                if disk.read(start, len(wanted)) != wanted:
                    wrong.append(start)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        presence = disk.layers[0].file.presence
        assert isinstance(presence, Presence)
        # Each of the readers may hold what it waits for.
        assert presence.blocks.count(1) * BLOCK <= SIZE // 4 + 3 * 64_000
    assert not wrong
    assert len(content) < elsewhere.bytes_fetched or kind == "compressed"


def test_who_reads_on_has_what_follows_fetched_ahead(tmp_path: Path) -> None:
    source, content = raw(tmp_path)
    elsewhere = Elsewhere(tmp_path, source)
    with elsewhere.open("raw", ahead=True) as disk:
        read = b"".join(disk.read(offset, BLOCK) for offset in range(0, SIZE, BLOCK))
    assert read == content[:SIZE]
    places = [place for start, length in elsewhere.fetched for place in range(start, start + length, BLOCK)]
    assert len(places) == len(set(places))
    assert len(elsewhere.fetched) < 16


def test_small_reads_that_jump_or_meet_by_chance_have_nothing_fetched_ahead(tmp_path: Path) -> None:
    """As a look at a disk does, whose tables and signatures lie apart."""
    source, content = raw(tmp_path)
    elsewhere = Elsewhere(tmp_path, source)
    with elsewhere.open("raw", ahead=True) as disk:
        places = [0, *(BLOCK << power for power in range(8))]
        for place in places:
            assert disk.read(place, 100) == content[place : place + 100]
    assert elsewhere.bytes_fetched == len(places) * BLOCK
