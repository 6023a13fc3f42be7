"""Units that the engine reads from the tables of a format: kept small, changed, never older than what was written."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import tapfs
from tapfs.disk.chain import OpenOptions, open_layers
from tapfs.disk.chain_map import map_chain, merge_mapped
from tapfs.disk.image import Image
from tests.conftest import REPOSITORY
from tests.native_programs import MEMORY, program
from tests.scattered_images import scattered_qcow

CLUSTER = 512
UNIT = 64 * CLUSTER
SIZE = 16 * UNIT


@pytest.fixture
def path(tmp_path: Path) -> Path:
    image = tmp_path / "a.qcow"
    tapfs.create(str(image), "qcow", SIZE, options={"cluster_size": str(CLUSTER)})
    return image


def opened(path: Path, *, cache_bytes: int = 32 << 20, writable: bool = True) -> Image:
    layers = open_layers(str(path), OpenOptions(writable=writable))
    return Image(layers, writable=writable, password=None, cache_bytes=cache_bytes)


def scattered(path: Path, seed: int = 1) -> dict[int, bytes]:
    """Every other cluster of the disk written in random order: the numbers of the clusters and their first bytes."""
    numbers = list(range(0, SIZE // CLUSTER, 2))
    random.Random(seed).shuffle(numbers)
    written = {number: number.to_bytes(8, "big") for number in numbers}
    with opened(path) as disk:
        for number, start in written.items():
            disk.write(number * CLUSTER, start)
    return written


def test_a_fragmented_unit_takes_no_more_than_its_table(path: Path) -> None:
    written = scattered(path)
    with opened(path, writable=False) as disk:
        for number, start in written.items():
            assert disk.read(number * CLUSTER, 8) == start
        counted = disk.statistics()
        assert counted.cache_fills == 16
        assert counted.cache_bytes <= 16 * (CLUSTER + 256)


def test_an_empty_or_orderly_unit_takes_a_run(path: Path) -> None:
    with opened(path) as disk:
        disk.write(3 * UNIT, bytes([7]) * UNIT)
    with opened(path, writable=False) as disk:
        assert disk.read(0, SIZE).count(7) == UNIT
        counted = disk.statistics()
        assert counted.cache_fills == 16
        assert counted.cache_bytes <= 16 * 256


def test_writes_change_units_that_are_kept_as_tables(path: Path) -> None:
    written = scattered(path)
    choice = random.Random(2)
    with opened(path) as disk:
        disk.read(0, SIZE)  # every unit is in the cache, as its table
        expected = bytearray(disk.read(0, SIZE))
        for _ in range(300):
            offset = choice.randrange(SIZE - 3 * CLUSTER)
            data = choice.randbytes(choice.randrange(1, 3 * CLUSTER))
            disk.write(offset, data)
            expected[offset : offset + len(data)] = data
        assert disk.read(0, SIZE) == expected
        disk.discard(5 * UNIT, 2 * UNIT)
        expected[5 * UNIT : 7 * UNIT] = bytes(2 * UNIT)
        assert disk.read(0, SIZE) == expected
        disk.flush()
        assert disk.read(0, SIZE) == expected
    assert len(written) == SIZE // CLUSTER // 2
    with opened(path, writable=False) as disk:
        assert disk.read(0, SIZE) == expected


@pytest.mark.parametrize("cache_bytes", [0, 32 << 20])
def test_large_tables_are_cached_in_pieces(tmp_path: Path, cache_bytes: int) -> None:
    """Tables of 2048 entries, read, changed, given back and read again, a page at a time."""
    image, size, bits = tmp_path / "large.qcow", 96 << 20, 14
    scattered_qcow(image, size, 2000, cluster_bits=bits, data=True)
    choice = random.Random(5)
    with opened(image, cache_bytes=cache_bytes) as disk:
        expected = bytearray(disk.read(0, size))
        for round_number in range(12):
            for _ in range(25):
                at, data = choice.randrange(size - 40000), choice.randbytes(choice.randrange(1, 40000))
                disk.write(at, data)
                expected[at : at + len(data)] = data
            at = choice.randrange(size >> bits) << bits
            disk.discard(at, min(1 << 20, size - at))
            expected[at : at + (1 << 20)] = bytes(min(1 << 20, size - at))
            if round_number % 3 == 0:
                disk.flush()
            for _ in range(50):
                at = choice.randrange(size - 70000)
                assert disk.read(at, 70000) == expected[at : at + 70000]
            assert list(disk.extents()) == list(merge_mapped(map_chain(disk.layers, 0, size)))
    with opened(image, writable=False, cache_bytes=cache_bytes) as disk:
        assert disk.read(70 << 20, 1 << 20) == expected[70 << 20 : 71 << 20]
        assert disk.statistics().cache_bytes < 8192  # one piece, not a table
        assert disk.read(0, size) == expected


def test_after_a_flush_the_engine_reads_the_tables_again(path: Path) -> None:
    scattered(path)
    with opened(path, cache_bytes=0) as disk:  # a few units stay, the rest is read each time
        for unit in range(16):
            disk.write(unit * UNIT + CLUSTER, b"new")
        disk.flush()
        before = disk.statistics().cache_fills
        for unit in range(16):
            assert disk.read(unit * UNIT + CLUSTER, 3) == b"new"
        assert disk.statistics().cache_fills >= before + 8


def test_a_failed_flush_leaves_changed_tables_to_the_driver(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scattered(path)
    with opened(path, cache_bytes=0) as disk:
        for unit in range(16):
            disk.write(unit * UNIT + CLUSTER, b"new")
        engine = disk.engine_disk
        with monkeypatch.context() as failing:
            failing.setattr(type(engine), "execute", lambda *_: (_ for _ in ()).throw(OSError("no")))
            with pytest.raises(OSError, match="no"):
                disk.flush()
        for unit in range(16):
            assert disk.read(unit * UNIT + CLUSTER, 3) == b"new"


def test_a_filled_stream_is_read_as_it_was_filled(path: Path) -> None:
    with opened(path) as disk:
        assert disk.read(0, UNIT) == bytes(UNIT)  # the engine has seen that there is no table
        writer = disk.stream_writer()
        writer.write_plain(CLUSTER, b"s" * CLUSTER)
        writer.finish()
        assert disk.read(CLUSTER, CLUSTER) == b"s" * CLUSTER


def test_a_unit_in_use_outlives_a_scan(path: Path) -> None:
    """The working set is proven by being wanted again; a scan of everything does not push it out."""
    scattered(path)
    units = 6
    with opened(path, writable=False, cache_bytes=(units + 8) * (CLUSTER + 256)) as disk:
        for _ in range(3):
            for unit in range(16):
                for wanted in range(units):
                    disk.read(wanted * UNIT, 8)
                disk.read(unit * UNIT, CLUSTER)
        misses = disk.statistics().cache_misses
        for unit in range(units, 16):
            disk.read(unit * UNIT, UNIT)
        scan = disk.statistics().cache_misses - misses
        for wanted in range(units):
            disk.read(wanted * UNIT, 8)
        assert disk.statistics().cache_misses - misses == scan


def test_a_working_set_keeps_its_place_beside_long_scans(tmp_path: Path) -> None:
    """Scans in small steps, one after the other and two at once, whose tables are read ahead of them."""
    units, hot = 2048, 64
    image = tmp_path / "large.qcow"
    scattered_qcow(image, units * UNIT, cluster_bits=9, clusters=units * 24, tables_first=True)
    with opened(image, writable=False, cache_bytes=3 * hot * 640) as disk:
        choice = random.Random(3)
        wanted = choice.sample(range(units), hot)
        for _ in range(30):
            for unit in choice.sample(wanted, hot):
                disk.read(unit * UNIT, 8)
            disk.read(choice.randrange(units) * UNIT, 8)
        for ahead in (0, units // 2):
            for unit in range(units // 2):
                for step in range(0, UNIT, UNIT // 8):
                    disk.read(unit * UNIT + step, 8)
                    disk.read((unit + ahead) * UNIT + step, 8)
            before = disk.statistics().cache_misses
            for unit in wanted:
                disk.read(unit * UNIT, 8)
            assert disk.statistics().cache_misses - before <= hot // 16
            assert disk.statistics().cache_bytes <= 3 * hot * 640


def test_a_large_unit_is_kept_where_small_proven_ones_fill_the_bound(path: Path) -> None:
    """The one unit that is not proven is not the victim of its own arrival: the request would never end."""
    with opened(path) as disk:
        disk.write(0, b"r" * (15 * UNIT))  # units of one run each
        for cluster in range(63, 0, -2):
            disk.write(15 * UNIT + cluster * CLUSTER, b"s")  # and one of 64
    program = """
import sys, tests.unit.engine.test_tables as here
with here.opened(here.Path(sys.argv[1]), writable=False, cache_bytes=1950) as disk:
    for _ in range(12):
        disk.engine_disk.forget(0, 14 * here.UNIT, here.UNIT)
        for unit in [*range(13), 14]:
            disk.read(unit * here.UNIT, 1)
    print(disk.read(15 * here.UNIT + here.CLUSTER, 1), disk.read(0, 1))
"""
    command = [sys.executable, "-c", program, str(path)]
    # The sanitizers' runtime is not preloaded in a process of our own.
    plain = {name: value for name, value in os.environ.items() if name != "TAPFS_ENGINE_DIR"}
    done = subprocess.run(command, cwd=REPOSITORY, env=plain, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "b's' b'r'\n"


def test_nobody_reads_a_map_from_before_a_write_that_was_acknowledged(path: Path) -> None:
    """Readers that read tables beside a writer that moves clusters and flushes: the number read never goes back."""
    scattered(path)
    clusters = [unit * 64 + 1 for unit in range(16)]
    acknowledged = dict.fromkeys(clusters, 0)
    problems: list[str] = []
    stop = threading.Event()

    def read(seed: int, disk: Image) -> None:
        choice = random.Random(seed)
        buffer = bytearray(8)
        while not stop.is_set() and not problems:
            cluster = choice.choice(clusters)
            least = acknowledged[cluster]
            disk.read_into(cluster * CLUSTER, buffer)
            found = int.from_bytes(buffer, "big")
            if found < least:
                problems.append(f"cluster {cluster}: read {found} after {least} had been written")

    with opened(path, cache_bytes=0) as disk:
        for cluster in clusters:
            disk.write(cluster * CLUSTER, bytes(8))
        threads = [threading.Thread(target=read, args=(seed, disk)) for seed in range(3)]
        for thread in threads:
            thread.start()
        choice = random.Random(9)
        for number in range(1, 1500):
            cluster = choice.choice(clusters)
            # A neighbour moves too: the old place of what is given back is used again after the flush.
            disk.discard((cluster + 2) * CLUSTER, CLUSTER)
            disk.write((cluster + 2) * CLUSTER, b"\xff" * CLUSTER)
            disk.write(cluster * CLUSTER, number.to_bytes(8, "big"))
            acknowledged[cluster] = number
            if number % 7 == 0:
                disk.flush()
        stop.set()
        for thread in threads:
            thread.join()
    assert problems == []


def native(folder: Path, name: str) -> Path:
    """A program whose engine's calls of pread it sees."""
    return program(folder, name, sanitizer=MEMORY, parts=("engine", "host"), wrapped=("pread",))


def ended(job: Path, folder: Path, number: int) -> tuple[int, str, str]:
    done = subprocess.run([job, folder / "file", str(number)], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.native
def test_tables_that_change_while_they_are_read(tmp_path: Path) -> None:
    """The bytes from before are in hand when the unit is patched, forgotten, not flushed: every time."""
    job = native(tmp_path, "table_race")
    assert [ended(job, tmp_path, number) for number in range(3)] == [(0, "ok\n", "")] * 3


@pytest.mark.native
def test_a_commit_to_the_top_while_a_map_is_merged(tmp_path: Path) -> None:
    """The commit comes between the look at the top layer and the end of the merging: patched, forgotten."""
    job = native(tmp_path, "merged_race")
    assert [ended(job, tmp_path, number) for number in range(2)] == [(0, "ok\n", "")] * 2


@pytest.mark.native
def test_threads_that_miss_maps_read_tables_at_the_same_time(tmp_path: Path) -> None:
    """Of different units, of one unit, of a parent; and a scan reads tables that lie together in a few reads."""
    job = native(tmp_path, "table_threads")
    assert [ended(job, tmp_path, number) for number in range(5)] == [(0, "ok\n", "")] * 5
