"""The QEMU tools of Debian's backports, beside the system's: some formats need a newer peer than Debian 12 has."""

from __future__ import annotations

import fcntl
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]


@cache
def newest_qemu(program: str) -> str:
    """The path of a program of QEMU 10 or newer. The first call fetches a package, unless `make bench` has done it."""
    words = [ROOT / "scripts/backports-qemu", ROOT / "build/qemu-backports"]
    (ROOT / "build").mkdir(exist_ok=True)
    with (ROOT / "build/qemu-backports.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the parts of the suite run beside each other
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip()) / program
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    assert int(version.split("version ")[1].split(".")[0]) >= 10, version
    return str(path)
