"""Disks of petabytes with nothing, or next to nothing, in them: nothing costs the more the larger a disk is."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tapfs
from tapfs import Image
from tapfs.formats.qcow.driver import QcowDriver
from tapfs.formats.qcow.writer import WritableQcowDriver
from tapfs.formats.raw import IdentityDriver
from tapfs.jobs.compare import compare
from tapfs.jobs.convert import Baseline, convert
from tapfs.kernel.engine import EngineDisk

PIB = 1 << 50

#: Steps that anything here may take. There were billions.
BUDGET = 20_000


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory: other host file systems have no files of such lengths."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts what drivers and the engine are asked, and fails beyond the budget."""
    count = [0]

    def counted(owner: type, name: str) -> None:
        original: Callable[..., object] = getattr(owner, name)

        def step(*arguments: object, **keywords: object) -> object:
            count[0] += 1
            assert count[0] < BUDGET, f"{name} again"
            return original(*arguments, **keywords)

        monkeypatch.setattr(owner, name, step)

    for owner, names in (
        (QcowDriver, ("map", "empty_run")),
        (WritableQcowDriver, ("reserve",)),
        (IdentityDriver, ("map", "empty_run", "reserve")),
        (EngineDisk, ("finished",)),
    ):
        for name in names:
            counted(owner, name)
    return count


def qcow(folder: Path) -> Path:
    """4 PiB, more tables than the engine holds the places of."""
    path = folder / "disk.qcow"
    tapfs.create(str(path), "qcow", 4 * PIB, options={"cluster_size": "65536"})
    return path


def tabled_qcow(folder: Path) -> Path:
    path = folder / "tabled.qcow"
    tapfs.create(str(path), "qcow", PIB, options={"cluster_size": "65536"})
    return path


def raw(folder: Path) -> Path:
    path = folder / "disk.raw"
    tapfs.create(str(path), "raw", 7 << 60)
    return path


def overlay(folder: Path) -> Path:
    path = folder / "overlay.qcow"
    options = {"cluster_size": "65536"}
    tapfs.create(str(path), "qcow", 4 * PIB, backing=str(qcow(folder)), backing_format="qcow", options=options)
    return path


def opened(path: Path, *, writable: bool = False) -> Image:
    return tapfs.open(path, format=path.suffix[1:], writable=writable)


@pytest.mark.usefixtures("steps")
@pytest.mark.parametrize("make", [qcow, tabled_qcow, raw, overlay])
def test_the_map_is_as_long_as_what_is_there(folder: Path, make: Callable[[Path], Path]) -> None:
    path = make(folder)
    with opened(path, writable=True) as disk:
        assert [(run.offset, run.length, run.zero) for run in disk.extents()] == [(0, disk.size, True)]
        places = [0, disk.size // 3 // 65536 * 65536, disk.size - 65536]
        for offset in places:
            disk.write(offset, b"x" * 65536)
        for flush in (False, True):
            if flush:
                disk.flush()
            assert [run.offset for run in disk.extents() if run.data] == places
            assert sum(run.length for run in disk.extents()) == disk.size


@pytest.mark.usefixtures("steps")
@pytest.mark.parametrize("make", [qcow, tabled_qcow, raw])
def test_zeros_and_discards_of_all_of_it(folder: Path, make: Callable[[Path], Path]) -> None:
    with opened(make(folder), writable=True) as disk:
        offset = disk.size // 2 // 65536 * 65536
        for forget in (disk.write_zeroes, disk.discard):
            disk.write(offset, b"x" * 65536)
            forget(0, disk.size)
            assert disk.read(offset, 65536) == bytes(65536)
        disk.flush()


@pytest.mark.usefixtures("steps")
def test_copies_and_comparisons(folder: Path) -> None:
    with opened(qcow(folder), writable=True) as source:
        source.write(3 * PIB, b"data" * 16384)
        other, flat = folder / "other.qcow", folder / "flat.raw"
        tapfs.create(str(other), "qcow", 4 * PIB, options={"cluster_size": "65536"})
        tapfs.create(str(flat), "raw", 4 * PIB)
        for path, baseline in ((other, Baseline.ZEROS), (flat, Baseline.ZEROS), (other, Baseline.ANYTHING)):
            with opened(path, writable=True) as target:
                convert(source, target, baseline=baseline)
                assert target.read(3 * PIB, 4) == b"data"
                assert compare(source, target) is None
