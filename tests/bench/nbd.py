"""`python -m tests.bench.nbd`: `tapfs serve` against qemu-nbd, qemu-storage-daemon and nbdkit, as clients see them.

Each contender serves the same image on a Unix socket, one after the other in each round. fio's nbd engine reads at
random, nbdcopy reads all. The table has the medians of the rates, and of the processor time of server and client for
each request, which says more on a machine that does other things, too.

fio also reads from a server without a disk (nbd_null.c), which is the most that this client gets from any server.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench.ring import build
from tests.bench.runner import TAPFS, qemu_backports

MIB = 1 << 20

#: The command that serves an image of a format on a socket, in the foreground.
Command = Callable[[Path, str, Path], list[str]]


@dataclass(frozen=True, slots=True)
class Contender:
    """A server by its name; `formats` that it serves, and the workloads that are for it, all if none is named."""

    name: str
    command: Command
    formats: tuple[str, ...] = ("raw", "qcow2")
    workloads: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Workload:
    """What a client does: `run` gives its rate, in what `unit` says, the requests, and the client's processor time."""

    name: str
    unit: str
    run: Callable[[str, int, int], tuple[float, float, float]]


def contenders(null: Path) -> list[Contender]:
    """tapfs, the system's QEMU, that of Debian's backports, nbdkit; and `null`, the server without a disk."""
    tapfs = TAPFS
    found = [
        Contender("tapfs", lambda image, kind, path: [tapfs, "serve", "-f", kind, "--socket", str(path), str(image)])
    ]
    backports = qemu_backports()
    for folder in (None, backports) if backports is not None else (None,):
        for program, command in (("qemu-nbd", _qemu_nbd), ("qemu-storage-daemon", _storage_daemon)):
            place = shutil.which(program) if folder is None else str(folder / program)
            if place is not None and Path(place).exists():
                version = subprocess.run(
                    [place, "--version"], capture_output=True, text=True, check=True
                ).stdout.split()
                number = next(word for word in version if word[0].isdigit())
                found.append(Contender(f"{program} {number}", _with(command, place)))
    if (nbdkit := shutil.which("nbdkit")) is not None:
        command = [nbdkit, "-f", "-r", "-U"]
        found.append(
            Contender("nbdkit file", lambda image, _, path: [*command, str(path), "file", str(image)], ("raw",))
        )
    # To answer eight at once is what had this client read the fastest, of 1, 4, 8, 16 and 24.
    for name, together in ((DEEP, 8), (SHALLOW, 1)):
        found.append(Contender("no disk at all", _null(null, together), ("raw",), (name,)))
    return found


def _null(program: Path, together: int) -> Command:
    return lambda image, _, path: [str(program), str(path), str(image.stat().st_size), str(together), "looks"]


def _with(command: Callable[[str, Path, str, Path], list[str]], program: str) -> Command:
    return lambda image, kind, path: command(program, image, kind, path)


def _qemu_nbd(program: str, image: Path, kind: str, path: Path) -> list[str]:
    return [
        program,
        "-r",
        "-t",
        "-e",
        "16",
        "-f",
        kind,
        "-k",
        str(path),
        "--aio=threads",
        "--cache=writeback",
        str(image),
    ]


def _storage_daemon(program: str, image: Path, kind: str, path: Path) -> list[str]:
    file = f"driver=file,filename={image},node-name=file,read-only=on"
    return [
        program,
        *("--blockdev", file),
        *("--blockdev", f"driver={kind},file=file,node-name=disk,read-only=on"),
        *("--nbd-server", f"addr.type=unix,addr.path={path},max-connections=16"),
        *("--export", "type=nbd,id=e,node-name=disk,name="),
    ]


@contextmanager
def served(contender: Contender, image: Path, kind: str, folder: Path) -> Generator[tuple[str, int]]:
    """The address of the image behind a contender, and the number of the serving process."""
    path = folder / "socket"
    path.unlink(missing_ok=True)
    with subprocess.Popen(contender.command(image, kind, path), stdout=subprocess.DEVNULL) as process:
        try:
            for _ in range(1000):
                if path.exists():
                    break
                time.sleep(0.01)
            yield f"nbd+unix:///?socket={path}", process.pid
        finally:
            process.terminate()


def processor_seconds(pid: int) -> float:
    """What all threads of a process have taken so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _fio(*words: str) -> Callable[[str, int, int], tuple[float, float, float]]:
    def run(uri: str, _size: int, seconds: int) -> tuple[float, float, float]:
        command = ["fio", "--name=nbd", "--ioengine=nbd", f"--uri={uri}", "--output-format=json", "--time_based=1"]
        command += [
            f"--runtime={seconds}",
            "--randrepeat=1",
            "--allrandrepeat=1",
            "--norandommap=1",
            "--group_reporting=1",
        ]
        done = subprocess.run([*command, *words], capture_output=True, text=True, check=True)
        (job,) = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
        client = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1000
        return job["read"]["iops"], job["read"]["total_ios"], client

    return run


def _nbdcopy(uri: str, size: int, _seconds: int) -> tuple[float, float, float]:
    started, before = time.monotonic(), _seconds_of_ended_programs()
    subprocess.run(["nbdcopy", "--no-extents", uri, "null:"], check=True)
    return size / MIB / (time.monotonic() - started), size / 65536, _seconds_of_ended_programs() - before


def _seconds_of_ended_programs() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


DEEP, SHALLOW = "4 KiB random reads, depth 32", "4 KiB random reads, depth 1"
WORKLOADS = [
    Workload(DEEP, "IOPS", _fio("--rw=randread", "--bs=4k", "--iodepth=32")),
    Workload(SHALLOW, "IOPS", _fio("--rw=randread", "--bs=4k", "--iodepth=1")),
    Workload("nbdcopy of all", "MiB/s", _nbdcopy),
]


def measure(images: dict[str, Path], size: int, rounds: int, seconds: int) -> list[dict[str, object]]:
    """A row for each format, workload and contender."""
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(prefix="tapfs-bench-nbd-") as folder:
        everybody = contenders(build(Path(folder), "nbd_null"))
        for kind, image in images.items():
            for workload in WORKLOADS:
                met: dict[str, list[tuple[float, float, float]]] = {}
                for _ in range(rounds):
                    for contender in everybody:
                        if kind in contender.formats and workload.name in (contender.workloads or [workload.name]):
                            found = _one(workload, contender, image, kind, Path(folder), size, seconds)
                            met.setdefault(contender.name, []).append(found)
                for who, several in met.items():
                    rate, server, client = map(statistics.median, zip(*several, strict=True))
                    row: dict[str, object] = {"image": kind, "workload": workload.name, "who": who}
                    row.update(unit=workload.unit, rate=rate, server_us=server, client_us=client)
                    rows.append(row)
    return rows


def _one(
    workload: Workload, contender: Contender, image: Path, kind: str, folder: Path, size: int, seconds: int
) -> tuple[float, float, float]:
    """The rate, and the processor time of server and client for each request."""
    with served(contender, image, kind, folder) as (uri, pid):
        workload.run(uri, size, 1)  # the maps and the host's memory are warm then
        before = processor_seconds(pid)
        rate, requests, client = workload.run(uri, size, seconds)
        return rate, (processor_seconds(pid) - before) / requests * 1e6, client / requests * 1e6


def table(rows: list[dict[str, object]]) -> str:
    """The rows as a table of Markdown."""
    lines = [
        "| image | workload | who | rate | µs of the server's processor for each request | of the client's |",
        "|---|---|---|---|---|---|",
    ]
    line = "| {image} | {workload} | {who} | {rate:,.0f} {unit} | {server_us:.1f} | {client_us:.1f} |"
    lines += [line.format(**row) for row in rows]
    return "\n".join(lines)


def main() -> int:
    """The script: see the module's docstring."""
    parser = argparse.ArgumentParser(description="tapfs serve against other NBD servers.")
    parser.add_argument("--size", metavar="MIB", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", type=Path)
    arguments, _ = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="tapfs-bench-nbd-") as folder:
        raw, qcow2 = Path(folder, "disk.raw"), Path(folder, "disk.qcow2")
        with raw.open("wb") as file:
            for _ in range(arguments.size):
                file.write(os.urandom(MIB))
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, qcow2], check=True)
        rows = measure({"raw": raw, "qcow2": qcow2}, arguments.size * MIB, arguments.rounds, arguments.seconds)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1))
    sys.stdout.write(table(rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
