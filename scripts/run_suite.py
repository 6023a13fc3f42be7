"""Run the tests in three rows beside each other, for one row leaves a processor idle.

usage: run_suite.py [--sanitized] PYTEST [OPTION...]    with --sanitized `make sanitize` is a part, too

Parts of one row, folders of tests/, run one after the other: they mount, attach and kill on the same machine. What a
part printed is in build/suite, and is shown where the part failed. The exit code is 1 if one did.

The files of the tests lie in an ext4 of the suite's own, whose device is a file in memory: the tests ask for some
hundred thousand barriers, and a slow disk makes hours of them. Without root or memory they lie where pytest puts them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
LOGS = REPOSITORY / "build/suite"
ROWS = (("fuse", "faults", "nbd", "vhost", "xen"), ("unit", "sanitized"), ("peer", "property", "crash", "torture"))
SANITIZED = "sanitized"
MEMORY = Path("/dev/shm")  # noqa: S108  the host's memory, not a folder for a name of ours alone
#: What must be free in memory for the file system, and how long its file, which has holes, looks.
NEEDED_BYTES = 8 << 30
DISK_BYTES = 24 << 30


@contextmanager
def suite_disk() -> Iterator[Path | None]:
    """A folder in a file system in memory, or None."""
    there = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free >= NEEDED_BYTES and available_memory() >= NEEDED_BYTES
    if os.geteuid() != 0 or not there:
        yield None
        return
    device = MEMORY / f"tapfs-suite-{os.getpid()}"
    folder = Path(tempfile.mkdtemp(prefix="tapfs-"))  # a short name: sockets lie below it
    with device.open("wb") as file:
        file.truncate(DISK_BYTES)
    try:
        subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", device], check=True)
        subprocess.run(["mount", "-o", "loop,discard", device, folder], check=True)
        device.unlink()  # the memory is free when the file system is gone, whatever ends this process
        try:
            (folder / "tmp").mkdir()
            (folder / "tmp").chmod(0o1777)
            yield folder
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)
    finally:
        device.unlink(missing_ok=True)
        folder.rmdir()


def available_memory() -> int:
    """The bytes of memory that the kernel could give to somebody now."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) << 10


def run_part(name: str, pytest: list[str], disk: Path | None) -> bool:
    """Run one part and say what became of it: whether it passed."""
    command = ["make", "--no-print-directory", "sanitize"] if name == SANITIZED else [*pytest, "-q", f"tests/{name}"]
    environment = dict(os.environ)
    folder = f"pytest-{name}"  # as pytest itself would call it: tests know folders that begin so
    if disk:
        options = f"--basetemp={disk / folder} -o tmp_path_retention_policy=failed"
        environment["PYTEST_ADDOPTS"] = f"{environment.get('PYTEST_ADDOPTS', '')} {options}"
        environment["TMPDIR"] = str(disk / "tmp")
    log = LOGS / f"{name}.log"
    begin = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=output, stderr=output)
        _, status, used = os.wait4(process.pid, 0)  # of all that the part started and waited for
    process.returncode = os.waitstatus_to_exitcode(status)
    text = log.read_text(errors="replace")
    passed = process.returncode == 0
    if disk:
        shutil.rmtree(disk / folder, ignore_errors=True)
    last = (text.splitlines() or ["nothing was printed"])[-1].strip("= ")
    clock = f"{time.monotonic() - begin:.0f} s by the clock, {used.ru_utime + used.ru_stime:.0f} s of a processor"
    said = f"{name}: {last} ({clock})\n"
    sys.stdout.write(said if passed else f"{text}\n{said}")
    sys.stdout.flush()
    return passed


def main(words: list[str]) -> int:
    """Run all rows."""
    sanitized = words[:1] == ["--sanitized"]
    pytest = words[sanitized:]
    if not pytest:
        sys.exit(__doc__)
    LOGS.mkdir(parents=True, exist_ok=True)
    known = {name for row in ROWS for name in row}
    found = {path.relative_to(REPOSITORY / "tests").parts[0] for path in (REPOSITORY / "tests").rglob("test_*.py")}
    if found - known:
        sys.exit(f"run_suite.py: these folders of tests/ are in no row: {', '.join(sorted(found - known))}")

    def run_row(row: tuple[str, ...]) -> bool:
        results = [run_part(name, pytest, disk) for name in row if sanitized or name != SANITIZED]
        return all(results)

    with suite_disk() as disk, ThreadPoolExecutor(len(ROWS)) as pool:
        results = list(pool.map(run_row, ROWS))
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
