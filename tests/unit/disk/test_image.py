"""Image and chain: ranges, threads, chains and the rules about parents."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import tapfs
from tapfs import ErrorKind, ImageError
from tapfs.driver import Operation, WritableDriver
from tapfs.extent import Range
from tapfs.jobs import create
from tapfs.jobs.create import NewImage
from tapfs.kernel.engine import EngineDisk, Statistics

SIZE = 4 << 20


def qcow(path: Path, backing: str | None = None, size: int | None = SIZE, backing_format: str | None = None) -> Path:
    tapfs.create(str(path), "qcow", size, backing=backing, backing_format=backing_format)
    return path


def failure(path: Path, **options: object) -> ImageError:
    with pytest.raises(ImageError) as raised:
        tapfs.open(path, **options)  # type: ignore[arg-type]
    return raised.value


def test_ranges_outside_the_disk_are_refused(tmp_path: Path) -> None:
    with tapfs.open(qcow(tmp_path / "a"), writable=True) as disk:
        for offset, length in ((-1, 1), (SIZE, 1), (SIZE - 1, 2), (0, SIZE + 1), (1 << 70, 1)):
            for call in (disk.read, disk.write_zeroes, disk.discard, disk.extents):
                with pytest.raises(ImageError) as raised:
                    call(offset, length)
                assert raised.value.kind is ErrorKind.OUT_OF_BOUNDS
            with pytest.raises(ImageError):
                disk.write(offset, bytes(min(length, SIZE + 1)))
        assert disk.read(SIZE, 0) == b""


def test_a_read_only_image_refuses_every_change(tmp_path: Path) -> None:
    with tapfs.open(qcow(tmp_path / "a")) as disk:
        for change in (lambda: disk.write(0, b"x"), lambda: disk.write_zeroes(0, 1), lambda: disk.discard(0, 1)):
            with pytest.raises(ImageError) as raised:
                change()
            assert raised.value.kind is ErrorKind.READ_ONLY
        disk.flush()


def test_a_closed_image_says_so(tmp_path: Path) -> None:
    disk = tapfs.open(qcow(tmp_path / "a"))
    disk.close()
    disk.close()
    with pytest.raises(ImageError, match="is closed"):
        disk.read(0, 1)


def test_a_raw_image_must_be_named_to_be_written(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(1000))
    error = failure(path, writable=True)
    assert (error.kind, "format='raw'" in str(error)) == (ErrorKind.READ_ONLY, True)
    with tapfs.open(path, writable=True, format="raw") as disk:
        assert disk.size == 1000
        disk.write(999, b"x")
    assert path.read_bytes() == bytes(999) + b"x"


def test_threads_that_allocate_the_same_granules_lose_nothing(tmp_path: Path) -> None:
    path = qcow(tmp_path / "a")
    with tapfs.open(path, writable=True) as disk:

        def write(thread: int) -> None:
            for offset in range(thread * 100, SIZE - 800, 800):
                disk.write(offset, bytes([1 + thread]) * 100)
                if offset % 160_000 == 0:
                    disk.flush()

        threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        expected = b"".join(bytes([1 + thread]) * 100 for thread in range(8)) * ((SIZE - 800) // 800)
        assert disk.read(0, len(expected)) == expected
    with tapfs.open(path) as disk:
        assert disk.read(0, len(expected)) == expected
    assert tapfs.check(path).leaks == tapfs.check(path).corruptions == 0


@pytest.mark.parametrize("options", [{}, {"blktap": "on"}, {"cluster_size": "65536"}])
@pytest.mark.parametrize("change", ["write_zeroes", "discard"])
@pytest.mark.parametrize("where", [(9728, 512), (10240, 0), (9216, 1024)])
def test_a_change_at_the_end_of_the_disk_stays_in_its_range(
    tmp_path: Path, options: dict[str, str], change: str, where: tuple[int, int]
) -> None:
    path = tmp_path / "a"
    tapfs.create(str(path), "qcow", 10240, options=options)
    with tapfs.open(path, writable=True) as disk:
        disk.write(0, b"A" * 10240)
        getattr(disk, change)(*where)
        assert disk.read(0, where[0]) == b"A" * where[0]


def test_an_allocation_that_fails_does_not_take_what_was_written_with_it(tmp_path: Path) -> None:
    path = qcow(tmp_path / "a", size=64 << 20)
    script = f"""
import resource, signal, tapfs
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
with tapfs.open({str(path)!r}, writable=True) as disk:
    disk.write(0, b"A" * 65536)
    try:
        disk.write(1 << 20, b"B" * (1 << 20))
    except tapfs.ImageError as error:
        assert error.kind == "no_space", error
    else:
        raise AssertionError("there was room")
    disk.flush()
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    with tapfs.open(path) as disk:
        assert disk.read(0, 65536) == b"A" * 65536
        assert not any(disk.read(1 << 20, 1 << 20))
    assert tapfs.check(path).corruptions == 0


def test_one_writer_at_a_time_in_a_new_extent_of_blktap(tmp_path: Path) -> None:
    path = tmp_path / "a"
    tapfs.create(str(path), "qcow", SIZE, options={"blktap": "on"})
    with tapfs.open(path, writable=True) as disk:
        driver = disk._top.driver
        assert isinstance(driver, WritableDriver)
        reservation = driver.reserve([Range(4096, 4096)], Operation.WRITE)
        assert reservation.ranges == (Range(0, 2 << 20),)
        driver.abort(reservation)


def test_a_file_that_comes_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with pytest.raises(ImageError) as raised, create.new_image(str(path), NewImage("qcow", SIZE)):
        path.write_bytes(b"somebody's")
    assert raised.value.kind is ErrorKind.EXISTS
    assert path.read_bytes() == b"somebody's"
    path.write_bytes(b"")
    qcow(path)
    assert os.listdir(tmp_path) == ["a"]


def test_a_chain_of_three_needs_its_formats_named(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(b"b" * SIZE)
    qcow(tmp_path / "middle", "base.raw", None)
    top = qcow(tmp_path / "top", "middle", None, "qcow")
    error = failure(top)
    assert (error.kind, "backing_formats=['qcow']" in str(error)) == (ErrorKind.DENIED, True)
    with tapfs.open(top, backing_formats=["qcow"]) as disk:
        assert disk.read(SIZE - 10, 10) == b"b" * 10
        assert disk.parents == (str(tmp_path / "middle"), str(base))


def test_loops_and_missing_parents_are_named(tmp_path: Path) -> None:
    (tmp_path / "loop").write_bytes(b"")
    (tmp_path / "base.raw").write_bytes(bytes(SIZE))
    qcow(tmp_path / "other", "base.raw")
    loop = qcow(tmp_path / "a", "other", backing_format="qcow")
    os.unlink(tmp_path / "base.raw")
    os.symlink("a", tmp_path / "base.raw")
    error = failure(loop, backing_formats=["qcow", "qcow"])
    assert (error.kind, "comes back" in str(error)) == (ErrorKind.CORRUPT, True)
    os.unlink(tmp_path / "base.raw")
    error = failure(tmp_path / "other")
    assert (error.kind, "backing=FILE" in str(error)) == (ErrorKind.NOT_FOUND, True)


def test_parents_stay_under_the_backing_root(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret").write_bytes(b"s" * SIZE)
    (inside / "base").write_bytes(b"b" * SIZE)
    os.symlink("../secret", inside / "link")
    for name, allowed in (("base", True), ("link", False), ("../secret", False), (str(tmp_path / "secret"), False)):
        image = qcow(inside / "image", name)
        if allowed:
            tapfs.open(image, backing_root=str(inside)).close()
        else:
            assert failure(image, backing_root=str(inside)).kind is ErrorKind.DENIED
        os.unlink(image)


def test_a_parent_that_ends_early_reads_as_zeros_beyond(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"b" * 100_001)
    image = qcow(tmp_path / "a", "base.raw", SIZE)
    with tapfs.open(image, writable=True) as disk:
        assert disk.read(100_000, 3) == b"b\0\0"
        disk.write(100_000, b"x")
        assert disk.read(99_999, 4) == b"bx\0\0"


def test_statistics_are_asked_for_while_the_image_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`tapfs list` asks a mount at any moment: the engine's disk must not be freed under the question."""
    order: list[str] = []
    asking, closed = threading.Event(), threading.Event()
    statistics, close = EngineDisk.statistics, EngineDisk.close

    def slow_statistics(disk: EngineDisk) -> Statistics:
        asking.set()
        closed.wait(0.2)  # a close that does not wait comes now
        order.append("answered")
        return statistics(disk)

    def noted_close(disk: EngineDisk) -> None:
        close(disk)
        order.append("closed")
        closed.set()

    image = tapfs.open(qcow(tmp_path / "image"), writable=True)
    image.write(0, b"data")
    monkeypatch.setattr(EngineDisk, "statistics", slow_statistics)
    monkeypatch.setattr(EngineDisk, "close", noted_close)
    asker = threading.Thread(target=image.statistics)
    asker.start()
    asking.wait()
    image.close()
    asker.join()
    assert order == ["answered", "closed"]
    with pytest.raises(ImageError, match="is closed"):
        image.statistics()
