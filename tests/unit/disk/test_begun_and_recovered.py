"""Plans of drivers before the first write and after the last, and journals that a crash has left."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import tapfs
from tapfs import ErrorKind, ImageError
from tapfs.disk import probe
from tapfs.disk.plugins import Plugin
from tapfs.driver import HostFile, OpenRequest
from tapfs.host.file import LocalFile
from tapfs.host.patched import patched_files
from tapfs.kernel.engine import EngineDisk
from tapfs.plan import Discard, Grow, Plan, Write, plan
from tests.flat_images import COUNTER_AT, MAGIC, FlatDriver, FlatFormat

#: A flat image says here whether it is being written, and here begins its journal: a length and the extents' table.
STATE_AT, JOURNAL_AT = COUNTER_AT + 8, COUNTER_AT + 512
CLEAN, DIRTY = b"clean", b"dirty"
SIZE = 64 << 10


class JournalledDriver(FlatDriver):
    """A flat image with a dirty mark, and a journal that holds a new table of extents."""

    format_name = "journalled"

    def __init__(self, file: HostFile, request: OpenRequest) -> None:
        super().__init__(file, request)
        self._file = file

    def begin(self) -> Plan:
        return plan([Write(0, STATE_AT, DIRTY)])

    def end(self) -> Plan:
        return plan([Write(0, STATE_AT, CLEAN)])

    def recovery(self) -> Plan | None:
        length = int.from_bytes(self._file.read(JOURNAL_AT, 4), "big")
        if not length:
            return None
        table = self._file.read(JOURNAL_AT + 4, length)
        return plan([Write(0, 0, table)], [Write(0, JOURNAL_AT, bytes(4)), Write(0, STATE_AT, CLEAN)])


class JournalledFormat(FlatFormat):
    name = "journalled"

    def probe(self, head: bytes, size: int) -> int:
        del head, size
        return 0

    def open(self, file: HostFile, request: OpenRequest) -> JournalledDriver:
        return JournalledDriver(file, request)


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(probe, "_others", lambda: {"journalled": Plugin(JournalledFormat(), "a test")})
    probe.format_named.cache_clear()
    yield
    probe.format_named.cache_clear()


def image(folder: Path, *, journal: str = "") -> Path:
    (folder / "data").write_bytes(b"d" * SIZE)
    (folder / "other").write_bytes(b"o" * SIZE)
    head = (MAGIC + f"{SIZE} rw 0 data\n".encode()).ljust(STATE_AT, b"\0") + CLEAN
    content = head.ljust(JOURNAL_AT, b"\0")
    if journal:
        table = (MAGIC + journal.encode()).ljust(64, b"\0")
        content += len(table).to_bytes(4, "big") + table
    path = folder / "image"
    path.write_bytes(content.ljust(JOURNAL_AT + 128, b"\0"))
    return path


def state(path: Path) -> bytes:
    return path.read_bytes()[STATE_AT : STATE_AT + 5]


def test_an_image_says_that_it_is_written_from_the_first_write_to_the_end(tmp_path: Path) -> None:
    path = image(tmp_path)
    with tapfs.open(path, format="journalled", writable=True) as disk:
        assert disk.read(0, 4) == b"dddd"
        assert state(path) == CLEAN
        disk.write(0, b"w")  # in place: the driver itself never hears of it
        assert state(path) == DIRTY
        disk.flush()
        assert state(path) == DIRTY
        disk.end_writing()
        assert state(path) == CLEAN
        disk.write(1, b"w")
        assert state(path) == DIRTY
    assert state(path) == CLEAN
    assert (tmp_path / "data").read_bytes()[:3] == b"wwd"


@pytest.mark.parametrize("change", ["write_zeroes", "discard"])
def test_zeroing_and_discarding_are_writes(tmp_path: Path, change: str) -> None:
    path = image(tmp_path)
    with tapfs.open(path, format="journalled", writable=True) as disk:
        getattr(disk, change)(0, 512)
        assert state(path) == DIRTY


def test_who_never_writes_leaves_the_image_as_it_is(tmp_path: Path) -> None:
    path = image(tmp_path)
    path.write_bytes(path.read_bytes().replace(CLEAN, b"other"))
    with tapfs.open(path, format="journalled", writable=True) as disk:
        disk.read(0, SIZE)
        disk.flush()
    assert state(path) == b"other"


def test_a_killed_writer_leaves_the_mark(tmp_path: Path) -> None:
    path = image(tmp_path)
    disk = tapfs.open(path, format="journalled", writable=True)
    disk.write(0, b"w")
    disk.abandon()
    assert state(path) == DIRTY


def test_no_write_is_let_in_before_the_mark_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = image(tmp_path)
    execute = EngineDisk.execute
    with tapfs.open(path, format="journalled", writable=True) as disk:

        def fail(engine: EngineDisk, executed: Plan) -> None:
            del engine, executed
            raise ImageError(ErrorKind.NO_SPACE, "no room for the mark")

        monkeypatch.setattr(EngineDisk, "execute", fail)
        with pytest.raises(ImageError, match="no room for the mark"):
            disk.write(0, b"w")
        assert (tmp_path / "data").read_bytes()[:1] == b"d"
        monkeypatch.setattr(EngineDisk, "execute", execute)
        disk.write(0, b"w")
        assert state(path) == DIRTY
    assert (tmp_path / "data").read_bytes()[:1] == b"w"


def test_writers_of_many_threads_begin_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = image(tmp_path)
    begun: list[int] = []
    begin = JournalledDriver.begin
    monkeypatch.setattr(JournalledDriver, "begin", lambda driver: begun.append(1) or begin(driver))
    with tapfs.open(path, format="journalled", writable=True) as disk:
        threads = [threading.Thread(target=disk.write, args=(512 * i, b"w" * 512)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert disk.read(0, 4096) == b"w" * 4096
    assert begun == [1]


def test_a_journal_is_replayed_for_writing(tmp_path: Path) -> None:
    path = image(tmp_path, journal=f"{SIZE} rw 0 other\n")
    with tapfs.open(path, format="journalled", writable=True) as disk:
        assert disk.read(0, 4) == b"oooo"
    content = path.read_bytes()
    assert content.startswith(MAGIC + f"{SIZE} rw 0 other\n".encode())
    assert content[JOURNAL_AT : JOURNAL_AT + 4] == bytes(4)


def test_a_journal_is_read_without_being_touched(tmp_path: Path) -> None:
    path = image(tmp_path, journal=f"{SIZE} rw 0 other\n")
    before = path.read_bytes()
    with tapfs.open(path, format="journalled") as disk:
        assert disk.read(0, 4) == b"oooo"
        assert disk.info["virtual_size"] == SIZE
    assert path.read_bytes() == before


def test_guest_data_under_the_journal_s_writes_is_refused(tmp_path: Path) -> None:
    """The engine would read there what the image will not say any more."""
    path = image(tmp_path, journal="512 rw 0 image\n")
    with tapfs.open(path, format="journalled") as disk, pytest.raises(ImageError) as raised:
        disk.read(0, 1)
    assert raised.value.kind is ErrorKind.CORRUPT
    assert "journal" in str(raised.value)


def test_a_file_is_seen_as_a_plan_would_leave_it(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    file = LocalFile.open(str(tmp_path / "a"))
    left = plan([Grow(0, 16), Write(0, 2, b"ab")], [Write(0, 3, b"cd"), Discard(0, 0, 2), Write(0, 18, b"end")])
    seen = patched_files([file], left)[0]
    assert seen.size() == 21
    assert seen.read(0, 100) == b"01acd56789" + bytes(8) + b"end"
    assert seen.read(3, 2) == b"cd"
    assert seen.read(20, 5) == b"d"
    assert seen.read(21, 5) == b""
    assert list(seen.data_ranges(5, 100)) == [(5, 16)]
    assert file.size() == 10
    file.close()
