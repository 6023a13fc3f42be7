"""Converting and comparing through the API: any layout of data, zeros and holes, every baseline, bounded memory."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

import tapfs
from tapfs.jobs.compare import Difference, compare, unequal_candidates
from tapfs.jobs.convert import Baseline, convert, convert_to_new
from tapfs.jobs.create import NewImage
from tapfs.jobs.pipeline import in_order

MIB = 1 << 20
LENGTHS = (1, 511, 512, 513, 4095, 4096, 4097, 65536, 65537, 131072, MIB - 1, 2 * MIB, 2 * MIB + 4096)


def _disk(path: Path, seed: int) -> bytes:
    """A raw disk of runs of noise, written zeros and holes; half of them aligned."""
    chance = random.Random(seed)
    content = bytearray()
    aligned = seed % 2 == 0
    with path.open("wb") as file:
        for _ in range(chance.randrange(1, 40)):
            length = chance.choice(LENGTHS) if not aligned else -(-chance.choice(LENGTHS) // 4096) * 4096
            kind = chance.choice(("noise", "zeros", "hole"))
            run = chance.randbytes(length) if kind == "noise" else bytes(length)
            if kind != "hole":
                file.seek(len(content))
                file.write(run)
            content += run
        file.truncate(len(content))
    return bytes(content)


@pytest.mark.parametrize("how", ["metadata", "falloc", "full"])
def test_places_that_were_made_before_are_not_for_packed_data(tmp_path: Path, how: str) -> None:
    raw, target = tmp_path / "source.raw", tmp_path / "target"
    raw.write_bytes(bytes(65536))
    with tapfs.open(raw, format="raw") as source:
        new = NewImage(format="qcow2", size=source.size, options={"preallocation": how})
        with pytest.raises(tapfs.ImageError, match="takes no places") as error:
            convert_to_new(source, str(target), new, compressed=True)
        assert error.value.kind is tapfs.ErrorKind.UNSUPPORTED
        assert not target.exists()


@pytest.mark.parametrize("seed", range(10))
def test_any_layout_survives(tmp_path: Path, seed: int) -> None:
    raw, parent = tmp_path / "source.raw", tmp_path / "parent.raw"
    content = _disk(raw, seed)
    other = _disk(parent, seed + 1000)
    with tapfs.open(raw, format="raw") as source:
        for name, new, compressed in (
            ("raw", NewImage(format="raw", size=source.size), False),
            ("plain", NewImage(format="qcow", size=source.size), False),
            ("blktap", NewImage(format="qcow", size=source.size, options={"blktap": "on"}), False),
            ("packed", NewImage(format="qcow", size=source.size), True),
            ("over", NewImage(format="qcow", size=source.size, backing=str(parent), backing_format="raw"), False),
        ):
            done: list[tuple[int, int]] = []
            target = tmp_path / name
            convert_to_new(
                source, str(target), new, compressed=compressed, progress=lambda a, b, to=done: to.append((a, b))
            )
            with tapfs.open(target, format=new.format, backing_formats=["raw"]) as made:
                assert made.read(0, len(content)) == content
                assert not any(made.read(len(content), made.size - len(content)))
                assert compare(source, made) is None
                assert compare(made, source) is None
            assert [at for at, _ in done] == sorted(at for at, _ in done)
            assert all(at <= total for at, total in done)
        existing = tmp_path / "existing"
        existing.write_bytes(other[: len(content)].ljust(len(content) + 5000, b"\xaa"))
        with tapfs.open(existing, format="raw", writable=True) as target_image:
            convert(source, target_image, baseline=Baseline.ANYTHING)
        assert existing.read_bytes() == content + bytes(5000)


@pytest.mark.parametrize("seed", range(10))
def test_the_first_difference_is_found(tmp_path: Path, seed: int) -> None:
    left, right = tmp_path / "left", tmp_path / "right"
    content = bytearray(_disk(left, seed))
    chance = random.Random(seed)
    for _ in range(3):
        content[chance.randrange(len(content))] ^= chance.randrange(256)
    content += bytes(chance.randrange(3) * 4000)
    right.write_bytes(content)
    original = left.read_bytes().ljust(len(content), b"\0")
    expected = next((at for at in range(len(content)) if original[at] != content[at]), None)
    with tapfs.open(left, format="raw") as a, tapfs.open(right, format="raw") as b:
        for pair in ((a, b), (b, a)):
            assert compare(*pair) == (None if expected is None else Difference(expected))
        if a.size != b.size:
            assert compare(a, b, strict=True) == Difference(None)


@pytest.mark.parametrize("seed", range(5))
def test_candidates_leave_out_only_what_is_zero_in_both(tmp_path: Path, seed: int) -> None:
    left, right = tmp_path / "left", tmp_path / "right"
    a_content, b_content = _disk(left, seed), _disk(right, seed + 50)
    with tapfs.open(left, format="raw") as a, tapfs.open(right, format="raw") as b:
        ranges = [each for ranges in unequal_candidates(a, b) for each in ranges]
    for first, second in pairwise(ranges):
        assert first.end <= second.offset
    at = 0
    for offset, length in [*ranges, (max(len(a_content), len(b_content)), 0)]:
        assert not any(a_content[at:offset])
        assert not any(b_content[at:offset])
        at = offset + length


def test_a_long_disk_of_zeros_is_not_read(tmp_path: Path) -> None:
    image = tmp_path / "a.qcow"
    tapfs.create(str(image), "qcow", 1 << 40)
    with tapfs.open(image) as disk:
        convert_to_new(disk, str(tmp_path / "b.raw"), NewImage(format="raw", size=disk.size))
        assert disk.statistics().bytes_read == 0
    assert (tmp_path / "b.raw").stat().st_size == 1 << 40
    assert (tmp_path / "b.raw").stat().st_blocks == 0


def test_memory_is_bounded(tmp_path: Path) -> None:
    """A disk larger than the bound, in a process of its own whose high-water mark is looked at."""
    raw = tmp_path / "a.raw"
    block = b"".join(b"%07d\n" % number for number in range(MIB // 8))
    with raw.open("wb") as file:
        for _ in range(192):
            file.write(block)
    script = (
        "import re, sys\nfrom tapfs.cli.main import main\n"
        "a, b, c = sys.argv[1:]\n"
        "assert main(['convert', '-f', 'raw', '-O', 'qcow', a, b]) == 0\n"
        "assert main(['convert', '-O', 'raw', b, c]) == 0\n"
        "assert main(['compare', '-q', '-f', 'raw', a, b]) == 0\n"
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read()).group(1))"
    )
    words = [sys.executable, "-c", script, *map(str, (raw, tmp_path / "b", tmp_path / "c"))]
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    assert int(done.stdout) < 150 << 10


def test_results_come_in_order_and_not_too_far_ahead() -> None:
    taken = 0
    seen = 0
    second_first = threading.Event()

    def jobs() -> Iterator[int]:
        nonlocal taken
        for number in range(50):
            taken += 1
            assert taken - seen <= 5
            yield number

    def work(number: int) -> int:
        if number == 0:
            second_first.wait(30)
        elif number == 1:
            second_first.set()
        return number * number

    for result in in_order(jobs(), work, workers=2, ahead=4):
        assert result == seen * seen
        seen += 1
    assert seen == 50


def test_the_first_exception_ends_it_and_nothing_runs_on() -> None:
    running: list[int] = []

    def work(number: int) -> int:
        running.append(number)
        if number == 5:
            raise RuntimeError("five")
        return number

    results = in_order(range(1000), work, workers=2, ahead=4)
    with pytest.raises(RuntimeError, match="five"):
        for _ in results:
            pass
    ended = len(running)
    assert ended < 15
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tapfs-window")]
