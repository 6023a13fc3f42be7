"""The mover as a program in C, under AddressSanitizer and ThreadSanitizer.

Against a model of its disk, beside the engine's own functions, beside threads that use the same disk; with io_uring,
without it and where it fails.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.native_programs import MEMORY, MOVER_FOLDERS, THREADS, program

pytestmark = pytest.mark.native
DRIVER = ("mover_driver", "mover_model", "mover_races")


@pytest.fixture(scope="module")
def checked_memory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return program(tmp_path_factory.mktemp("mover-asan"), *DRIVER, sanitizer=MEMORY, parts=MOVER_FOLDERS)


@pytest.fixture(scope="module")
def checked_threads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return program(tmp_path_factory.mktemp("mover-tsan"), *DRIVER, sanitizer=THREADS, parts=MOVER_FOLDERS)


def run(driver: Path, scenario: str, folder: Path, options: str, seed: int = 1) -> None:
    done = subprocess.run(
        [driver, scenario, folder, options, str(seed)], capture_output=True, text=True, check=False, timeout=300
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


# The options are letters: r io_uring, m io_uring but for direct writes, d O_DIRECT, c a cipher, f failing
# submissions, n a kernel without io_uring.


@pytest.mark.parametrize("options", ["-", "r", "d", "rd", "rc", "rn", "rf", "rdf"])
def test_many_in_flight_against_a_model(checked_memory: Path, tmp_path: Path, options: str) -> None:
    run(checked_memory, "model", tmp_path, options)


@pytest.mark.parametrize("options", ["-", "r", "rd"])
def test_says_what_the_engine_says(checked_memory: Path, tmp_path: Path, options: str) -> None:
    """MISS and RESERVE with the same place and length as tapfs_read and tapfs_write, and the same bytes before it."""
    run(checked_memory, "outcomes", tmp_path, options)


@pytest.mark.parametrize("options", ["-", "r", "rd", "rdf"])
def test_fails_as_the_engine_fails(checked_memory: Path, tmp_path: Path, options: str) -> None:
    """EIO, EFBIG, EBADF, ERANGE and EROFS from the same layer, file, offset and operation."""
    run(checked_memory, "errors", tmp_path, options)


@pytest.mark.parametrize("options", ["-", "r", "rd"])
def test_quiesce_waits_for_what_is_in_flight(checked_memory: Path, tmp_path: Path, options: str) -> None:
    """Granules move to other places under load, and the old places are used for other bytes after a quiesce."""
    run(checked_memory, "quiesce", tmp_path, options)


@pytest.mark.parametrize("options", ["d", "rd", "rdf"])
def test_blocks_that_others_modify(checked_memory: Path, tmp_path: Path, options: str) -> None:
    run(checked_memory, "blocks", tmp_path, options)


@pytest.mark.parametrize("options", ["r", "rd", "m", "md"])
def test_needs_no_worker(checked_memory: Path, tmp_path: Path, options: str) -> None:
    """What the file's alignment allows goes straight between the parts and the host: the workers' calls fail here.

    With `m` direct writes are left to the workers, for io_uring would go on with them after a kill.
    """
    run(checked_memory, "paths", tmp_path, options)


@pytest.mark.parametrize("options", ["-", "d", "r", "rd"])
def test_notes_writes_and_keeps_to_the_locks(checked_memory: Path, tmp_path: Path, options: str) -> None:
    run(checked_memory, "state", tmp_path, options)


@pytest.mark.parametrize(
    ("scenario", "options"),
    [("model", "-"), ("model", "rd"), ("model", "rf"), ("quiesce", "r"), ("quiesce", "d"), ("blocks", "rd")],
)
def test_no_race(checked_threads: Path, tmp_path: Path, scenario: str, options: str) -> None:
    run(checked_threads, scenario, tmp_path, options, seed=2)


@pytest.mark.parametrize("threads", [False, True])
def test_lends_what_the_host_has_in_memory(
    checked_memory: Path, checked_threads: Path, tmp_path: Path, *, threads: bool
) -> None:
    """And a quiesce waits until it is given back, a hole is left one, and what lies in two places is not lent."""
    run(checked_threads if threads else checked_memory, "loans", tmp_path, "r")
