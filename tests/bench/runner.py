"""Run commands in turn, several times, and say how they compare: medians, ratios, peak memory."""

from __future__ import annotations

import argparse
import compileall
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

#: The tapfs that is measured: $TAPFS, or the one beside this Python. In the venv of a developer Python finds modules
#: more slowly than in a plain installation, so its start takes longer.
TAPFS = os.environ.get("TAPFS", str(Path(sys.executable).with_name("tapfs")))


@dataclass(slots=True)
class Measurement:
    """What one contender took for one job."""

    seconds: list[float] = field(default_factory=list[float])
    cpu_seconds: list[float] = field(default_factory=list[float])
    peak_bytes: int = 0
    output_bytes: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def cpu_median(self) -> float:
        return statistics.median(self.cpu_seconds)


@dataclass(frozen=True, slots=True)
class Job:
    """One row of the table: the same work by several contenders.

    `contenders` maps a name to a command line; "tapfs" is compared with each of the others.
    `clean` runs before every command. `goal` says what the ratio should be, in words.
    `statuses` are the exit codes of a success. The table has the size of `output`, the file that each command makes.
    """

    name: str
    contenders: Mapping[str, Sequence[str]]
    clean: Callable[[], None] = lambda: None
    goal: str = ""
    statuses: tuple[int, ...] = (0,)
    output: Path | None = None


ROOT = Path(__file__).parents[2]


def qemu_backports() -> Path | None:
    """The folder of the QEMU programs of Debian's backports, unpacked beside the system's."""
    command = [ROOT / "scripts/backports-qemu", ROOT / "build/qemu-backports"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        print(f"bench: no QEMU from backports: {result.stderr.strip()[-200:]}", file=sys.stderr)
        return None
    return Path(result.stdout.strip())


def synced(command: Sequence[str], out: Path) -> list[str]:
    """The command, after which the file that it made is durable: what qemu-img writes it leaves in the page cache."""
    return ["sh", "-c", f"{shlex.join(command)} && sync -d {shlex.quote(str(out))}"]


def measure(job: Job, rounds: int) -> dict[str, Measurement]:
    """Run each contender `rounds` times, taking turns so that noise hits all alike."""
    results = {name: Measurement() for name in job.contenders}
    for number in range(rounds):
        for name, command in job.contenders.items():
            job.clean()
            seconds, cpu_seconds, peak = _run(command, job.statuses)
            results[name].seconds.append(seconds)
            results[name].cpu_seconds.append(cpu_seconds)
            results[name].peak_bytes = max(results[name].peak_bytes, peak)
            results[name].output_bytes = job.output.stat().st_size if job.output else None
            took = f"{seconds:.2f} s, {cpu_seconds:.2f} s of CPU"
            print(f"  {job.name}: {name} run {number + 1}: {took}", file=sys.stderr, flush=True)
    return results


#: Started for each command, because the peak of a child counts from the fork: a small parent, small error.
_LAUNCHER = """
import os, sys, time
start = time.perf_counter()
silent = [(os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0)]
process = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=silent)
_, status, usage = os.wait4(process, 0)
cpu = usage.ru_utime + usage.ru_stime
print(os.waitstatus_to_exitcode(status), time.perf_counter() - start, cpu, usage.ru_maxrss * 1024)
"""


#: An installed tapfs has its byte code. Where Python may not keep it, each run would compile all sources anew: 50 ms.
_SOURCES = ("tapfs", "formats", "kernel")
_ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def _run(command: Sequence[str], statuses: Sequence[int]) -> tuple[float, float, int]:
    launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, *command]
    result = subprocess.run(launcher, capture_output=True, text=True, check=True, env=_ENVIRONMENT)
    status, seconds, cpu_seconds, peak = result.stdout.split()
    if int(status) not in statuses:
        raise SystemExit(f"{' '.join(command)}: exit {status}: {result.stderr.strip()}")
    return float(seconds), float(cpu_seconds), int(peak)


def keep_byte_code() -> None:
    """Compile tapfs as pip does: a command in its sandbox keeps no byte code, and would compile anew in each run."""
    for folder in _SOURCES:
        compileall.compile_dir(ROOT / folder, quiet=2)


def rows_of(job: Job, results: dict[str, Measurement]) -> list[dict[str, object]]:
    """The table rows of a job: one for each peer, or one alone."""
    own = results["tapfs"]
    row = {
        "job": job.name,
        "goal": job.goal,
        "tapfs_s": round(own.median, 3),
        "tapfs_cpu_s": round(own.cpu_median, 3),
        "tapfs_peak_mib": own.peak_bytes >> 20,
        **_output("tapfs", own),
    }
    peers = [name for name in results if name != "tapfs"]
    if not peers:
        return [row]
    return [
        {
            **row,
            "peer": name,
            "peer_s": round(results[name].median, 3),
            "peer_cpu_s": round(results[name].cpu_median, 3),
            "peer_peak_mib": results[name].peak_bytes >> 20,
            **_output("peer", results[name]),
            "ratio": round(results[name].median / own.median, 2),
            "cpu_ratio": round(results[name].cpu_median / own.cpu_median, 2),
        }
        for name in peers
    ]


def _output(who: str, measurement: Measurement) -> dict[str, object]:
    size = measurement.output_bytes
    return {} if size is None else {f"{who}_file_mib": round(size / (1 << 20), 1)}


def table(rows: Sequence[dict[str, object]]) -> str:
    """The rows as aligned text; the ratio is how many times faster tapfs was."""
    own = ("tapfs_s", "tapfs_cpu_s", "tapfs_peak_mib", "tapfs_file_mib")
    theirs = ("peer", "peer_s", "peer_cpu_s", "peer_peak_mib", "peer_file_mib")
    columns = ("job", *own, *theirs, "ratio", "cpu_ratio", "goal")
    cells = [columns, *(tuple(str(row.get(column, "")) for column in columns) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def run_jobs(
    make_jobs: Callable[[Path, int, dict[str, str]], list[Job]],
    peers: dict[str, str],
    *,
    target: str,
    description: str | None,
    size: int,
    unit: str,
) -> int:
    """The command line of a benchmark: make the images, run the jobs, print the table."""
    parser = argparse.ArgumentParser(prog=f"{target} BENCH=...", description=description)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each command (median is shown)")
    parser.add_argument("--size", type=int, default=size, metavar=unit, help=f"size of the disk (default: {size})")
    parser.add_argument("--only", help="only the jobs whose name contains this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON too")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where to put the images (default: the temp folder)")
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []
    keep_byte_code()
    with tempfile.TemporaryDirectory(prefix="tapfs-bench-", dir=arguments.work) as folder:
        for job in make_jobs(Path(folder), arguments.size, peers):
            if arguments.only is None or arguments.only in job.name:
                rows += rows_of(job, measure(job, arguments.rounds))
    print(table(rows))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0
