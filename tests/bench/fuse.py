"""`python -m tests.bench.fuse`: the same fio jobs on the same image, mounted by each contender in turn."""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.bench.mounts import Contender, contenders, served
from tests.bench.runner import TAPFS, qemu_backports

MIB = 1 << 20
TIB = 1 << 40


@dataclass(frozen=True, slots=True)
class FioJob:
    """One line of the table. `allocating`: on an empty image. `cold`: right after mounting."""

    name: str
    pattern: str
    block: str
    depth: int = 1
    direct: bool = True
    allocating: bool = False
    cold: bool = False

    @property
    def in_bytes(self) -> bool:
        """Whether bytes per second are shown rather than requests per second."""
        return self.block == "1M"


JOBS = (
    FioJob("random read 4 KiB, cold map", "randread", "4k", cold=True),
    FioJob("random read 4 KiB, depth 1", "randread", "4k"),
    FioJob("random read 4 KiB, depth 8", "randread", "4k", depth=8),
    FioJob("random write 4 KiB, depth 1", "randwrite", "4k"),
    FioJob("random write 4 KiB, depth 8", "randwrite", "4k", depth=8),
    FioJob("sequential read 1 MiB", "read", "1M"),
    FioJob("sequential write 1 MiB", "write", "1M"),
    FioJob("buffered read 1 MiB", "read", "1M", direct=False),
    FioJob("buffered random read 4 KiB", "randread", "4k", direct=False),
    FioJob("allocating write 4 KiB, depth 1", "randwrite", "4k", allocating=True),
    FioJob("allocating write 4 KiB, depth 8", "randwrite", "4k", depth=8, allocating=True),
    FioJob("allocating write 64 KiB, sequential", "write", "64k", allocating=True),
)


def run_fio(job: FioJob, target: Path, size: int, seconds: int) -> float:
    """Requests per second, or MiB per second for large blocks."""
    command = [
        "fio",
        "--output-format=json",
        f"--name={job.name}",
        f"--filename={target}",
        f"--rw={job.pattern}",
        f"--bs={job.block}",
        f"--iodepth={job.depth}",
        f"--ioengine={'libaio' if job.depth > 1 else 'psync'}",
        f"--direct={int(job.direct)}",
        f"--size={size}",
        "--thread",
        "--randrepeat=1",
        # A map of the blocks that were read would take more memory than a huge disk's server.
        f"--norandommap={int(size > TIB)}",
        "--invalidate=1",
        # A pass over an empty image ends when it is full: only then is every write an allocation.
        *([] if job.allocating else ["--time_based", f"--runtime={1 if job.cold else seconds}"]),
        *([f"--io_size={size // (8 if job.block == '4k' else 1)}"] if job.allocating else []),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    # fio may say before it what it has chosen, such as a wider generator of random numbers.
    side = json.loads(result.stdout[result.stdout.index("{") :])["jobs"][0][
        "read" if "read" in job.pattern else "write"
    ]
    return float(side["bw_bytes"]) / MIB if job.in_bytes else float(side["iops"])


def make_images(work: Path, size_mib: int) -> dict[str, Path]:
    """A raw image full of random bytes, and the same as qcow: every cluster is allocated."""
    raw, qcow = work / "full.raw", work / "full.qcow"
    generator = random.Random(2006)
    with raw.open("wb") as file:
        for _ in range(size_mib):
            file.write(generator.randbytes(MIB))
    tapfs = TAPFS
    subprocess.run([tapfs, "convert", "-f", "raw", "-O", "qcow", str(raw), str(qcow)], check=True)
    return {"raw": raw, "qcow": qcow}


def disk_size(work: Path) -> int:
    """Bytes of the disks that `make_images` made."""
    return (work / "full.raw").stat().st_size


def measure(
    work: Path, images: dict[str, Path], only: str | None, rounds: int, seconds: int
) -> list[dict[str, object]]:
    """All rows: job, format, contender, median."""
    rows: list[dict[str, object]] = []
    field = contenders(qemu_backports())
    for image_format, image in images.items():
        for job in JOBS:
            label = f"{image_format}: {job.name}"
            if (only is not None and only not in label) or (job.allocating and image_format == "raw"):
                continue
            values: dict[str, list[float]] = {}
            for _ in range(rounds):
                for contender in field:
                    if image_format in contender.formats:
                        value = _one(job, contender, image, image_format, work, seconds)
                        values.setdefault(contender.name, []).append(value)
                        print(f"  {label}: {contender.name}: {value:.0f}", file=sys.stderr, flush=True)
            if image_format == "raw":
                values["the bare file"] = [run_fio(job, image, image.stat().st_size, seconds) for _ in range(rounds)]
            for name, seen in values.items():
                unit = "MiB/s" if job.in_bytes else "IOPS"
                rows.append({"job": label, "who": name, "median": round(statistics.median(seen), 1), "unit": unit})
    return rows


def _one(job: FioJob, contender: Contender, image: Path, image_format: str, work: Path, seconds: int) -> float:
    size = disk_size(work)
    target = image
    if job.allocating:
        size = 256 * MIB
        target = work / "empty"
        target.unlink(missing_ok=True)
        subprocess.run(["qemu-img", "create", "-q", "-f", image_format, str(target), str(size)], check=True)
    folder = work / "mount"
    with served(contender, target, image_format, folder) as disk:
        value = run_fio(job, disk, size, seconds)
    shutil.rmtree(folder)
    return value


def with_ratios(rows: list[dict[str, object]]) -> str:
    """The table: for each job every contender, and how many times faster tapfs (auto) is."""
    lines: list[str] = []
    jobs = dict.fromkeys(str(row["job"]) for row in rows)
    for job in jobs:
        mine = [row for row in rows if row["job"] == job]
        own = next((float(str(row["median"])) for row in mine if row["who"] == "tapfs auto"), 0.0)
        lines.append(f"{job} ({mine[0]['unit']})")
        for row in mine:
            median = float(str(row["median"]))
            ratio = own / median if median else 0.0
            lines.append(f"    {row['who']:<18} {median:>12.0f}   tapfs auto is {ratio:.2f}x")
    return "\n".join(lines)


def plot(rows: list[dict[str, object]], path: Path) -> None:
    """A bar chart of tapfs against each contender, as PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    jobs = list(dict.fromkeys(str(row["job"]) for row in rows))
    names = list(dict.fromkeys(str(row["who"]) for row in rows))
    figure, axes = plt.subplots(figsize=(10, 0.45 * len(jobs) * max(1, len(names) / 3) + 1))
    height = 0.8 / len(names)
    for number, name in enumerate(names):
        by_job = {str(row["job"]): float(str(row["median"])) for row in rows if row["who"] == name}
        own = {str(row["job"]): float(str(row["median"])) for row in rows if row["who"] == "tapfs auto"}
        values = [by_job.get(job, 0.0) / own[job] if own.get(job) else 0.0 for job in jobs]
        axes.barh([place + number * height for place in range(len(jobs))], values, height, label=name)
    axes.set_yticks([place + 0.4 for place in range(len(jobs))], jobs)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("speed relative to tapfs (auto) = 1")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    """Run, print, save."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.fuse", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=3, help="of each fio run")
    parser.add_argument("--size", type=int, default=1024, metavar="MIB")
    parser.add_argument("--only", help="only jobs whose 'format: name' contains this")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--png", type=Path, metavar="FILE")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where to put the images")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tapfs-bench-", dir=arguments.work) as folder:
        work = Path(folder)
        images = make_images(work, arguments.size)
        rows = measure(work, images, arguments.only, arguments.rounds, arguments.seconds)
    print(with_ratios(rows))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    if arguments.png is not None:
        plot(rows, arguments.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
