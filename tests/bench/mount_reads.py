"""`python -m tests.bench.mount_reads`: random reads of mounted images, tapfs against qemu-storage-daemon.

Full images of VMDK, VHD, VHDX and VDI, and three of qcow2: two have only compressed clusters, one of each type, and one
is a disk of 16 TiB whose map does not fit the cache. The daemons are that of Debian's backports and the one beside the
program that $QEMU_IMG names, with one iothread and, where it takes two, with two.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.__main__ import MIB, make_source
from tests.bench.block_formats import FORMATS
from tests.bench.fuse import FioJob, run_fio
from tests.bench.mounts import Contender, served, storage_daemon, tapfs
from tests.bench.runner import TAPFS, qemu_backports
from tests.scattered_qcow2 import PIECE_BITS, scattered_qcow2, stepped

HUGE = 16 << 40
#: Every eighth piece of the tables has clusters, so many.
PIECES, CLUSTERS_OF_PIECE = HUGE >> 16 + PIECE_BITS, 16
#: QEMU's names of the formats.
SERVED = ("vmdk", "vpc", "vhdx", "vdi", "qcow2")
JOBS = (FioJob("depth 1", "randread", "4k"), FioJob("depth 8", "randread", "4k", depth=8))


def contenders(*, writable: bool) -> list[Contender]:
    """tapfs, and the daemon with each number of iothreads that it takes."""
    found = [Contender("tapfs", SERVED, tapfs("auto", writable=writable))]
    programs = [qemu_backports(), Path(named).parent if (named := os.environ.get("QEMU_IMG")) else None]
    for folder in filter(None, programs):
        daemon = shutil.which("qemu-storage-daemon", path=str(folder))
        if daemon is None:
            continue
        version = subprocess.run([daemon, "--version"], capture_output=True, text=True, check=True).stdout.split()[2]
        # The first FUSE export with several is that of QEMU 11.
        for threads in (1, 2) if int(version.split(".")[0]) >= 11 else (1,):
            name = f"qsd {version}, {threads} iothread{'s' if threads > 1 else ''}"
            found.append(Contender(name, SERVED, storage_daemon(daemon, iothreads=threads, writable=writable)))
    return found


def images(work: Path, size_mib: int) -> Iterator[tuple[str, Path, str, int]]:
    """The name of each image for the table, the image, its format, and the size of its disk."""
    mixed, text = work / "mixed.raw", work / "text.raw"
    make_source(mixed, 3 * size_mib)
    with mixed.open("rb") as source, text.open("wb") as file:
        for number in range(size_mib):
            source.seek((3 * number + 1) * MIB)
            file.write(source.read(MIB))
    mixed.unlink()
    program = TAPFS
    for kind in SERVED[:-1]:
        image = work / f"full.{kind}"
        subprocess.run([program, "convert", "-f", "raw", "-O", kind, text, image], check=True)
        yield f"full {FORMATS[kind]}", image, kind, size_mib * MIB
        image.unlink()
    for kind in ("zlib", "zstd"):
        image = work / f"{kind}.qcow2"
        options = ["-c", "-o", f"compression_type={kind}"]
        subprocess.run([program, "convert", "-f", "raw", "-O", "qcow2", *options, text, image], check=True)
        yield f"compressed, {kind}", image, "qcow2", size_mib * MIB
    huge = work / "huge.qcow2"
    pieces = stepped(PIECES // 8, PIECES)
    chosen = ((piece << PIECE_BITS) + number * 31 for piece in pieces for number in range(CLUSTERS_OF_PIECE))
    scattered_qcow2(huge, HUGE, chosen)
    yield "16 TiB, fragmented", huge, "qcow2", HUGE


@dataclass(frozen=True, slots=True)
class Server:
    """The processes that serve an image: the most memory that one has had, and their processor time until now."""

    peak_mib: int
    cpu_seconds: float


def server_of(image: Path) -> Server:
    """Those with the image in their command lines."""
    peak, ticks = 0, 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            lines = (process / "status").read_text().splitlines()
            times = (process / "stat").read_text().rpartition(")")[2].split()[11:13]
        except OSError:
            continue  # it has ended
        if any(os.fsencode(image) in word for word in words):
            peak = max([peak, *(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))])
            ticks += sum(map(int, times))
    return Server(peak >> 10, ticks / os.sysconf("SC_CLK_TCK"))


@dataclass(slots=True)
class Seen:
    """What one contender did for one job, run after run."""

    rates: list[float] = field(default_factory=list[float])
    cpu_microseconds: list[float] = field(default_factory=list[float])
    peak_mib: int = 0


def measure(work: Path, size_mib: int, rounds: int, seconds: int, only: str) -> list[dict[str, object]]:
    """All rows: work, contender, median of reads a second, the server's processor time for each, its peak of memory."""
    rows: list[dict[str, object]] = []
    everyone = contenders(writable=False)
    for title, image, image_format, size in images(work, size_mib):
        seen: dict[tuple[str, str], Seen] = {}
        for _ in range(rounds if only in title else 0):
            for contender in everyone:
                with served(contender, image, image_format, work / "mount") as disk:
                    for job in JOBS:
                        before = server_of(image)
                        rate = run_fio(job, disk, size, seconds)
                        after = server_of(image)
                        each = (after.cpu_seconds - before.cpu_seconds) / (rate * seconds) * 1e6
                        result = seen.setdefault((f"{title}, {job.name}", contender.name), Seen())
                        result.rates.append(rate)
                        result.cpu_microseconds.append(each)
                        result.peak_mib = max(result.peak_mib, after.peak_mib)
                        line = f"  {title}, {job.name}: {contender.name}: {rate:.0f}, {each:.0f} us of CPU each"
                        print(line, file=sys.stderr, flush=True)
                shutil.rmtree(work / "mount")
        for (job_name, name), result in seen.items():
            rate, each = round(statistics.median(result.rates)), round(statistics.median(result.cpu_microseconds), 1)
            figures = {"reads_a_second": rate, "cpu_us": each, "peak_mib": result.peak_mib}
            rows.append({"job": job_name, "who": name, **figures})
    return rows


def table(rows: list[dict[str, object]]) -> str:
    """For each work every contender, and how many times its rate tapfs reads."""
    own = {row["job"]: float(str(row["reads_a_second"])) for row in rows if row["who"] == "tapfs"}
    lines = [
        f"{row['job']:<28} {row['who']:<24} {row['reads_a_second']:>8} a second {row['cpu_us']:>7} us of CPU each"
        f" {row['peak_mib']:>6} MiB   tapfs is {own[row['job']] / max(1.0, float(str(row['reads_a_second']))):.2f}x"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> int:
    """Run, print, save."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.mount_reads", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=3, help="of each fio run")
    parser.add_argument("--size", type=int, default=256, metavar="MIB", help="of the compressed disk")
    parser.add_argument("--only", default="", help="only images whose name contains this")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where to put the images")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tapfs-bench-", dir=arguments.work) as folder:
        rows = measure(Path(folder), arguments.size, arguments.rounds, arguments.seconds, arguments.only)
    print(table(rows))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
