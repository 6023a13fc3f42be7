"""`python -m tests.bench.ring`: a Xen ring in a simulated machine, and QEMU's vhost-user ring with the same requests.

The backend has one processor for all of its threads and the kernel's work for it, the guest another. What is shown is
the rate, and the processor time that the backend spent on each request: the ratio of two backends in one run says most.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.bench.runner import ROOT, TAPFS, qemu_backports

MIB = 1 << 20
_BLOCK = 4096
_PATIENCE_SECONDS = 30

#: As ring_frontend.c has them: its ring's pages are granted by these references, its event channel is this port.
_REFERENCES, _PORT = range(8, 12), 1

_PROCESSORS = sorted(os.sched_getaffinity(0))
BACKEND_CPU, GUEST_CPU = _PROCESSORS[0], _PROCESSORS[-1]


@dataclass(frozen=True, slots=True)
class Job:
    """One workload. `segments`: the most pages in a request of the ring."""

    name: str
    pattern: str
    request_bytes: int
    depth: int
    segments: int = 11
    goal: str = ""


JOBS = (
    Job("random read 4 KiB", "randread", _BLOCK, 32, goal=">= 200,000/s"),
    Job("random write 4 KiB", "randwrite", _BLOCK, 32),
    Job("sequential read 128 KiB, indirect", "read", 32 * _BLOCK, 16, segments=32, goal=">= 3 GiB/s"),
    Job("sequential read 128 KiB, 3 x 44 KiB", "read", 32 * _BLOCK, 10, goal=">= 3 GiB/s"),
    Job("sequential write 128 KiB, indirect", "write", 32 * _BLOCK, 16, segments=32),
)


@dataclass(frozen=True, slots=True)
class Disk:
    """What is served; `size` in bytes is the guest's."""

    image: Path
    format_name: str
    size: int


@dataclass(frozen=True, slots=True)
class Result:
    """One run."""

    requests_per_second: float
    bytes_per_second: float
    #: Of the backend.
    cpu_seconds_per_request: float

    @classmethod
    def of(cls, report: dict[str, float]) -> Result:
        requests, seconds = report["requests"], report["seconds"]
        return cls(requests / seconds, report["bytes"] / seconds, report["backend_cpu_seconds"] / max(requests, 1))


def build(work: Path, name: str, *libraries: str) -> Path:
    """Compile one of the programs of this folder."""
    program = work / name
    source = Path(__file__).with_name(f"{name}.c")
    command = ["gcc", "-O2", "-std=gnu11", "-D_GNU_SOURCE", "-o", str(program), str(source), *libraries]
    subprocess.run(command, check=True)
    return program


#: The unit in which raw images are written, and so cached: in pieces of 4 KiB the kernel reads them slower, in
#: pieces of 1 MiB ext4 needs ten times as long to overwrite 4 KiB.
_PIECE_BLOCKS = 16


def make_raw(path: Path, size_mib: int) -> Path:
    """An image whose blocks begin with their numbers; it is in the page cache."""
    rest = (bytes(range(1, 256)) * 17)[: _BLOCK - 8]
    with path.open("wb", buffering=0) as file:
        for first in range(0, size_mib * MIB // _BLOCK, _PIECE_BLOCKS):
            file.write(b"".join(struct.pack("<Q", first + number) + rest for number in range(_PIECE_BLOCKS)))
    return path


def make_disks(work: Path, size_mib: int) -> list[Disk]:
    """A raw image, and the same as qcow."""
    raw, qcow = make_raw(work / "disk.raw", size_mib), work / "disk.qcow"
    tapfs = TAPFS
    subprocess.run([tapfs, "convert", "-f", "raw", "-O", "qcow", str(raw), str(qcow)], check=True)
    return [Disk(raw, "raw", size_mib * MIB), Disk(qcow, "qcow", size_mib * MIB)]


def _on(processor: int, *command: object) -> list[str]:
    return ["taskset", "-c", str(processor), *map(str, command)]


def _report(frontend: subprocess.Popen[str], start: str | None = None) -> Result:
    output, _ = frontend.communicate(start)
    if frontend.returncode != 0:
        raise SystemExit(f"bench: {frontend.args} failed")
    return Result.of(json.loads(output))


class Backend:
    """Something that serves images to a guest; `name` stands in the table."""

    formats = ("raw", "qcow")

    def __init__(self, name: str) -> None:
        self.name = name

    def run(self, job: Job, disk: Disk, seconds: int) -> Result:
        raise NotImplementedError

    @staticmethod
    def _workload(job: Job, disk: Disk, seconds: int) -> list[object]:
        return [job.pattern, job.request_bytes, job.depth, seconds, disk.size]


class Ring(Backend):
    """tapfs, with one way to come to the guest's pages."""

    def __init__(self, grants: str, frontend: Path) -> None:
        super().__init__(f"tapfs {grants}")
        self._grants, self._frontend = grants, frontend

    def run(self, job: Job, disk: Disk, seconds: int) -> Result:
        # In memory, as a guest's pages are.
        with tempfile.TemporaryDirectory(prefix="tapfs-bench-", dir="/dev/shm") as machine:
            module = [sys.executable, "-m", "tests.bench.ring_backend"]
            command = [*module, machine, str(disk.image), disk.format_name, self._grants, str(BACKEND_CPU)]
            with subprocess.Popen(
                command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            ) as backend:
                workload = [*self._workload(job, disk, seconds), backend.pid]
                with subprocess.Popen(
                    _on(GUEST_CPU, self._frontend, machine, job.segments, *workload),
                    text=True,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                ) as frontend:
                    self._await(frontend, "ready")
                    self._tell(backend, " ".join(map(str, [*_REFERENCES, _PORT])))
                    self._await(backend, "connected")
                    result = _report(frontend, "go\n")
                self._counters(backend)
        return result

    @staticmethod
    def _await(process: subprocess.Popen[str], word: str) -> None:
        assert process.stdout is not None
        if process.stdout.readline().strip() != word:
            raise SystemExit(f"bench: {process.args} did not get {word}")

    @staticmethod
    def _tell(process: subprocess.Popen[str], line: str) -> None:
        assert process.stdin is not None
        process.stdin.write(f"{line}\n")
        process.stdin.flush()

    @staticmethod
    def _counters(backend: subprocess.Popen[str]) -> None:
        output, _ = backend.communicate()
        counters = json.loads(output)
        if counters["errors"]:
            raise SystemExit(f"bench: {counters}")
        names = ("at_once", "borrowed", "merged", "parked", "batches", "notifications")
        shown = {name: counters[name] for name in names}
        print(f"    {shown}", file=sys.stderr)


class VhostUser(Backend):
    """A program that serves a disk by vhost-user: `command` gives its words for a disk and a socket."""

    def __init__(self, name: str, frontend: Path, command: Callable[[Disk, str], Sequence[str]]) -> None:
        super().__init__(name)
        self._frontend, self._command = frontend, command

    def run(self, job: Job, disk: Disk, seconds: int) -> Result:
        with tempfile.TemporaryDirectory(prefix="tapfs-bench-") as folder:
            socket = f"{folder}/socket"
            with self._serve(disk, socket) as daemon:
                command = _on(GUEST_CPU, self._frontend, socket, *self._workload(job, disk, seconds), daemon)
                with subprocess.Popen(command, text=True, stdout=subprocess.PIPE) as frontend:
                    return _report(frontend)

    @contextmanager
    def _serve(self, disk: Disk, socket: str) -> Iterator[int]:
        """The program's process id while it serves."""
        with subprocess.Popen(_on(BACKEND_CPU, *self._command(disk, socket)), stdout=subprocess.DEVNULL) as daemon:
            try:
                deadline = time.monotonic() + _PATIENCE_SECONDS
                while not Path(socket).exists():
                    if daemon.poll() is not None or time.monotonic() > deadline:
                        raise SystemExit(f"bench: {self.name} does not serve {disk.image}")
                    time.sleep(0.05)
                yield daemon.pid
            finally:
                daemon.terminate()


def storage_daemons(frontend: Path) -> list[VhostUser]:
    """The qemu-storage-daemon beside QEMU_IMG, else that of the backports, with either way to do I/O."""
    named = os.environ.get("QEMU_IMG")
    newer = qemu_backports() if named is None else Path(named).parent
    program = None if newer is None else shutil.which("qemu-storage-daemon", path=str(newer))
    program = program or shutil.which("qemu-storage-daemon")
    if program is None:
        return []
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.split()[2]

    def command(way: str, disk: Disk, socket: str) -> Sequence[str]:
        return [
            str(program),
            *("--blockdev", f"driver=file,node-name=file,filename={disk.image},aio={way}"),
            *("--blockdev", f"driver={disk.format_name},node-name=disk,file=file"),
            *("--export", f"type=vhost-user-blk,id=x,node-name=disk,addr.type=unix,addr.path={socket},writable=on"),
        ]

    return [VhostUser(f"qsd {version} {way}", frontend, partial(command, way)) for way in ("threads", "io_uring")]


class BareFile(Backend):
    """fio on a file like the raw image, one request at a time, without any guest: what the kernel takes for it."""

    formats = ("raw",)

    def __init__(self, file: Path) -> None:
        super().__init__("fio psync on the file")
        self._file = file

    def run(self, job: Job, disk: Disk, seconds: int) -> Result:
        command = _on(
            BACKEND_CPU,
            "fio",
            "--output-format=json",
            "--name=bare",
            f"--filename={self._file}",
            f"--rw={job.pattern}",
            f"--bs={job.request_bytes}",
            "--ioengine=psync",
            "--thread",
            "--invalidate=0",
            "--time_based",
            "--gtod_reduce=1",
            f"--runtime={seconds}",
            f"--size={disk.size}",
        )
        report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["jobs"][0]
        side = report["write" if "write" in job.pattern else "read"]
        busy = (report["usr_cpu"] + report["sys_cpu"]) / 100 * report["job_runtime"] / 1000
        return Result(side["iops"], side["bw_bytes"], busy / side["total_ios"])


def backends(work: Path, size_mib: int) -> list[Backend]:
    """Those that this machine has."""
    ring_frontend = build(work, "ring_frontend")
    found: list[Backend] = [Ring(grants, ring_frontend) for grants in ("copy", "map", "persistent")]
    found += storage_daemons(build(work, "vhost_frontend"))
    return [*found, BareFile(make_raw(work / "file", size_mib))]


def measure(
    field: Sequence[Backend], disks: Sequence[Disk], only: str | None, rounds: int, seconds: int
) -> list[dict[str, object]]:
    """All rows: job, who, medians."""
    rows: list[dict[str, object]] = []
    for disk in disks:
        for job in JOBS:
            label = f"{disk.format_name}: {job.name}"
            contenders = [one for one in field if disk.format_name in one.formats]
            seen: dict[str, list[Result]] = {}
            for _ in range(rounds):
                for contender in contenders:
                    if only is None or only in f"{label} {contender.name}":
                        result = contender.run(job, disk, seconds)
                        seen.setdefault(contender.name, []).append(result)
                        print(f"  {label}: {contender.name}: {result.requests_per_second:.0f}/s", file=sys.stderr)
            rows += [_row(job, label, name, results) for name, results in seen.items()]
    return rows


def _row(job: Job, label: str, name: str, results: Sequence[Result]) -> dict[str, object]:
    return {
        "job": label,
        "who": name,
        "requests_per_second": round(statistics.median(result.requests_per_second for result in results)),
        "gib_per_second": round(statistics.median(result.bytes_per_second for result in results) / (1 << 30), 2),
        "cpu_us_per_request": round(statistics.median(result.cpu_seconds_per_request for result in results) * 1e6, 2),
        "goal": job.goal if name.startswith("tapfs") else "",
    }


def table(rows: Sequence[dict[str, object]]) -> str:
    """For each job every backend, and how much processor time it takes beside the most frugal of tapfs."""
    lines: list[str] = []
    for job in dict.fromkeys(str(row["job"]) for row in rows):
        mine = [row for row in rows if row["job"] == job]
        own = min(
            (float(str(row["cpu_us_per_request"])) for row in mine if str(row["who"]).startswith("tapfs")), default=0
        )
        lines.append(job)
        for row in mine:
            cpu = float(str(row["cpu_us_per_request"]))
            ratio = f"{cpu / own:>6.2f}x" if own else ""
            lines.append(
                f"    {row['who']:<26} {row['requests_per_second']:>8}/s {row['gib_per_second']:>6.2f} GiB/s"
                f" {cpu:>8.2f} us CPU {ratio} {row['goal']}"
            )
    return "\n".join(lines)


def main() -> int:
    """Run, print, save."""
    return run("python -m tests.bench.ring", __doc__, backends)


def run(program: str, description: str | None, field: Callable[[Path, int], list[Backend]]) -> int:
    """The command line of a benchmark of the backends that `field` makes in a folder, with a size in MiB."""
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=2, help="of each run")
    parser.add_argument("--size", type=int, default=512, metavar="MIB")
    parser.add_argument("--only", help="only what has this in 'format: job backend'")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where to put the images")
    arguments = parser.parse_args()
    if BACKEND_CPU == GUEST_CPU:
        raise SystemExit("bench: a ring needs two processors, one for the backend and one for the guest")
    with tempfile.TemporaryDirectory(prefix="tapfs-bench-", dir=arguments.work) as folder:
        work = Path(folder)
        disks = make_disks(work, arguments.size)
        rows = measure(field(work, arguments.size), disks, arguments.only, arguments.rounds, arguments.seconds)
    print(table(rows))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
