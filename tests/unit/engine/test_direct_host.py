"""O_DIRECT on hosts that grow a file meanwhile, refuse transfers, or have large blocks."""

from __future__ import annotations

import fcntl
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import tapfs
from tests.native_programs import MEMORY, MOVER_FOLDERS, THREADS, program
from tests.unit.engine.engine_disks import pattern

#: The system calls that the program plays.
PLAYED = ("pread", "pwrite", "fcntl", "fstat", "statx")


def driver(folder: Path, sanitizer: str) -> Path:
    return program(folder, "direct_driver", sanitizer=sanitizer, parts=MOVER_FOLDERS, wrapped=PLAYED)


def run(driver: Path, scenario: str, folder: Path) -> None:
    done = subprocess.run([driver, scenario, folder], capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


@pytest.fixture(scope="module")
def checked_memory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return driver(tmp_path_factory.mktemp("direct-asan"), MEMORY)


@pytest.fixture(scope="module")
def checked_threads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return driver(tmp_path_factory.mktemp("direct-tsan"), THREADS)


@pytest.mark.native
@pytest.mark.parametrize("scenario", ["grows", "broken-off", "refused", "moves", "blocks"])
def test_a_host_that_is_played(checked_memory: Path, tmp_path: Path, scenario: str) -> None:
    run(checked_memory, scenario, tmp_path)


@pytest.mark.native
@pytest.mark.parametrize("scenario", ["refused", "moves"])
def test_no_race(checked_threads: Path, tmp_path: Path, scenario: str) -> None:
    run(checked_threads, scenario, tmp_path)


@pytest.fixture
def large_blocks(tmp_path: Path) -> Iterator[Path]:
    """A device of 256 KiB with the largest logical blocks that this kernel gives a loop device."""
    assert os.geteuid() == 0, "run the suite as root: it needs a loop device"
    backing = tmp_path / "backing"
    backing.write_bytes(pattern(256 << 10))
    for block in (16384, 4096):
        made = subprocess.run(
            ["losetup", "--find", "--show", "--sector-size", str(block), backing],
            capture_output=True,
            text=True,
            check=False,
        )
        if made.returncode == 0:
            break
    else:
        raise AssertionError(made.stderr)
    device = Path(made.stdout.strip())
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def test_a_device_with_large_blocks_keeps_direct_io(large_blocks: Path) -> None:
    choose = random.Random(1)
    model = bytearray(pattern(256 << 10))
    with tapfs.open(large_blocks, format="raw", writable=True, direct=True) as image:
        assert image.read(0, image.size) == model
        for turn in range(60):
            offset = choose.choice([choose.randrange(len(model)), choose.randrange(64) * 4096])
            length = min(len(model) - offset, choose.choice([1, 512, 4096, 5000, 40000]))
            model[offset : offset + length] = new = pattern(length, turn)
            image.write(offset, new)
        assert image.read(0, image.size) == model
        descriptor = image.layers[0].file.data_descriptor
        assert fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT
