"""Measures what hashing, verifying and proved reads of a mount cost in processor time: `make bench-verify`."""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

_MIB = 1 << 20
_TICK = os.sysconf("SC_CLK_TCK")
_TAPFS = (sys.executable, "-m", "tapfs.cli")


def main() -> None:
    """Measure and print a table; --json writes it, too."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--reads", type=int, default=5000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tapfs-bench-", dir="/var/tmp") as folder:
        rows = _measure(Path(folder), arguments.rounds, arguments.mib, arguments.reads)
    for name, value in rows.items():
        print(f"{name:<44}{value:10.3f}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2))


def _measure(folder: Path, rounds: int, mib: int, reads: int) -> dict[str, float]:
    image = folder / "disk.raw"
    with image.open("wb") as file:
        for _ in range(mib):
            file.write(os.urandom(_MIB))
    rows: dict[str, float] = {}
    hash_words = ("hash", "-q", "-f", "raw", "--force")
    for leaf in ("4K", "64K"):
        words = (*hash_words, "--leaf", leaf, "-o", f"{image}.{leaf}", image)
        rows[f"hash, leaves of {leaf}, s/GiB"] = _median(rounds, lambda words=words: _command(*words)) * 1024 / mib
        words = ("verify", "-q", "-f", "raw", image, f"{image}.{leaf}")
        rows[f"verify, leaves of {leaf}, s/GiB"] = _median(rounds, lambda words=words: _command(*words)) * 1024 / mib
    mounts = {
        "native": ("--engine", "native"),
        "pyfuse3": ("--engine", "pyfuse3"),
        "verified, leaves of 64K": ("--verify-reads", "--sidecar", f"{image}.64K"),
        "verified, leaves of 4K": ("--verify-reads", "--sidecar", f"{image}.4K"),
    }
    for name, options in mounts.items():
        ordered = _median(rounds, lambda options=options: _mounted(image, options, _read_all)) * 1024 / mib
        rows[f"{name}: sequential, s/GiB"] = ordered
        chosen = _median(rounds, lambda options=options: _mounted(image, options, lambda disk: _read_some(disk, reads)))
        rows[f"{name}: random 4 KiB, us/read"] = chosen / reads * 1e6
    return rows


def _median(rounds: int, measure: Callable[[], float]) -> float:
    return statistics.median(measure() for _ in range(rounds))


def _command(*words: object) -> float:
    """The processor time of a command, in seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*_TAPFS, *map(str, words)], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _mounted(image: Path, options: tuple[str, ...], read: Callable[[Path], None]) -> float:
    """The processor time of a mount's process while somebody reads, in seconds."""
    with tempfile.TemporaryDirectory(prefix="tapfs-bench-") as folder:
        subprocess.run([*_TAPFS, "mount", "-f", "raw", *options, str(image), folder], check=True)
        try:
            listed = json.loads(subprocess.run([*_TAPFS, "list", "--json"], check=True, capture_output=True).stdout)
            pid = next(each["pid"] for each in listed["mounts"] if each["mountpoint"] == os.path.realpath(folder))
            before = _time_of(pid)
            read(Path(folder) / "disk")
            return _time_of(pid) - before
        finally:
            subprocess.run([*_TAPFS, "umount", folder], check=True)


def _time_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


def _read_all(disk: Path) -> None:
    with disk.open("rb", buffering=0) as file:
        while file.read(_MIB):
            pass


def _read_some(disk: Path, reads: int) -> None:
    """Small reads at places that a seed gives, past the page cache."""
    chance = random.Random(1)
    descriptor = os.open(disk, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        pages = os.fstat(descriptor).st_size // 4096
        for _ in range(reads):
            os.pread(descriptor, 4096, chance.randrange(pages) * 4096)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    main()
