"""System calls of a program that have to do with the files of a folder: found, and failed one at a time.

strace stands outside tapfs. A call is named by its system call and its number among those of one thread, which is how
strace counts.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import REPOSITORY

#: The system calls that are failed, with the errors: of the disk, of a full host, of a signal.
CALLS: dict[str, tuple[str, ...]] = {
    "openat": ("EIO", "ENOSPC", "EINTR"),
    "read": ("EIO", "EINTR"),
    "write": ("EIO", "ENOSPC", "EINTR"),
    "pread64": ("EIO", "EINTR"),
    "preadv": ("EIO", "EINTR"),
    "pwrite64": ("EIO", "ENOSPC", "EINTR"),
    "pwritev": ("EIO", "ENOSPC", "EINTR"),
    "fallocate": ("EIO", "ENOSPC", "EINTR", "EOPNOTSUPP"),
    "ftruncate": ("EIO", "ENOSPC", "EINTR"),
    "fdatasync": ("EIO", "ENOSPC"),
    "fsync": ("EIO", "ENOSPC"),
    "copy_file_range": ("EIO", "ENOSPC", "EXDEV"),
    "lseek": ("EIO",),
    "fstat": ("EIO",),
    "newfstatat": ("EIO",),
    "statfs": ("EIO",),
    "fstatfs": ("EIO",),
    "fcntl": ("ENOLCK", "EINTR"),
    "flock": ("ENOLCK", "EINTR"),
    "mmap": ("ENOMEM",),
    "ioctl": ("EIO",),
    "link": ("EIO", "ENOSPC"),
    "linkat": ("EIO", "ENOSPC"),
    "rename": ("EIO", "ENOSPC"),
    "renameat2": ("EIO", "ENOSPC"),
    "unlink": ("EIO",),
    "unlinkat": ("EIO",),
    "getdents64": ("EIO",),
    "fadvise64": ("EIO",),
    "sync_file_range": ("EIO",),
    "fchmod": ("EPERM",),
    "fchown": ("EPERM",),
}
_LINE = re.compile(r"^(?P<thread>\d+) +(?P<name>\w+)\((?P<rest>.*)$")
_PATIENCE_SECONDS = 120


@dataclass(frozen=True, order=True)
class Fault:
    """A call of a program, by its number among those of a thread from 1, and the error that it has."""

    call: str
    number: int
    error: str

    def __str__(self) -> str:
        return f"{self.call}:error={self.error}:when={self.number}"


@dataclass(frozen=True)
class Ended:
    """The end of a program: its status, its output, and whether the fault met a call that has to do with the folder."""

    status: int
    output: str
    met: bool


def faults(command: Sequence[str], folder: Path, log: Path) -> tuple[Ended, list[Fault]]:
    """Run a program without faults; all that one of its calls on the folder can have."""
    ended = _run(command, folder, log, ["-e", f"trace={','.join(CALLS)}"])
    counts: Counter[tuple[str, str]] = Counter()
    found: set[Fault] = set()
    for line in log.read_text(errors="replace").splitlines():
        match = _LINE.match(line)
        if match is None or match["name"] not in CALLS:
            continue
        counts[match["thread"], match["name"]] += 1
        if _is_about(match["rest"], folder):
            number = counts[match["thread"], match["name"]]
            found.update(Fault(match["name"], number, error) for error in CALLS[match["name"]])
    return ended, sorted(found)


def run_with(fault: Fault, command: Sequence[str], folder: Path, log: Path) -> Ended:
    """Run a program with a fault."""
    return _run(command, folder, log, ["-e", f"trace={fault.call}", "-e", f"inject={fault}"])


def finished(
    words: Sequence[str], patience: float, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program that asks nothing to its end; what it says is in `stdout`. Raises TimeoutExpired."""
    return subprocess.run(
        words,
        cwd=REPOSITORY,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        timeout=patience,
    )


def _run(command: Sequence[str], folder: Path, log: Path, words: Sequence[str]) -> Ended:
    strace = ["strace", "-f", "-qq", "-y", "--seccomp-bpf", "-o", str(log), *words]
    done = finished([*strace, *command], _PATIENCE_SECONDS)
    lines = log.read_text(errors="replace").splitlines()
    met = any("(INJECTED)" in line and _is_about(line, folder) for line in lines)
    return Ended(done.returncode, done.stdout, met)


def _is_about(arguments: str, folder: Path) -> bool:
    """Whether a call names a file in the folder, or has one open, also one without a name."""
    return f"{folder}/" in arguments
