"""A Xen device under ThreadSanitizer, and under AddressSanitizer and UBSan, as a program in C."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.native_programs import MEMORY, THREADS, program

pytestmark = pytest.mark.native

#: The kernel's calls that xen_fake_kernel.c plays.
WRAPPED = ("open", "close", "ioctl", "mmap", "munmap", "write")


@pytest.mark.parametrize("sanitizer", [THREADS, MEMORY])
def test_no_report(tmp_path: Path, sanitizer: str) -> None:
    """For each kind of grants, with io_uring (rounds are even) and without."""
    job = program(tmp_path, "xen_ring_threads", "owned_disk", sanitizer=sanitizer)
    for grants, rounds in ((0, 300), (0, 301), (1, 301), (2, 301)):
        machine = tmp_path / f"machine-{grants}-{rounds}"
        machine.mkdir()
        command = [job, machine, tmp_path / "disk", str(grants), str(rounds)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


def test_no_notification_is_missed(tmp_path: Path) -> None:
    """The event channel is masked as the kernel masks it, from each report on until its number is written back."""
    job = program(tmp_path, "xen_wakeups", "xen_fake_kernel", "owned_disk", sanitizer=THREADS, wrapped=WRAPPED)
    command = [job, tmp_path / "disk", "8000"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) > 0
