"""`python -m tests.bench.mount_writes`: allocating writes through a mount, against qemu-storage-daemon.

A mount of tapfs has a keeper, and keeps the plan of its next flush with every commit. So what was answered outlives a
kill of its server. The daemon keeps nothing of the kind. What is shown is the rate, and the processor time that the
servers (the keeper, too) take for each write into a cluster that is new.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.bench.__main__ import MIB
from tests.bench.fuse import FioJob, run_fio
from tests.bench.mount_reads import Seen, contenders, server_of
from tests.bench.mounts import served
from tests.bench.runner import TAPFS

FORMATS = ("qcow", "qcow2")
JOBS = (
    FioJob("depth 1", "randwrite", "4k", allocating=True),
    FioJob("depth 8", "randwrite", "4k", depth=8, allocating=True),
)
#: fio writes so many of the clusters of 4 KiB, each once.
_PART = 8


def measure(work: Path, size_mib: int, rounds: int, only: str) -> list[dict[str, object]]:
    """All rows: work, contender, medians of writes a second and of the servers' processor time for each."""
    rows: list[dict[str, object]] = []
    image, everyone = work / "new", contenders(writable=True)
    program = TAPFS
    writes = size_mib * MIB // _PART // 4096
    for image_format in FORMATS:
        for job in JOBS:
            title, seen = f"new clusters of {image_format}, {job.name}", dict[str, Seen]()
            for _ in range(rounds if only in title else 0):
                for contender in everyone:
                    words = ["create", "--force", "-f", image_format, str(image), f"{size_mib}M"]
                    subprocess.run([program, *words], check=True, stdout=subprocess.DEVNULL)
                    with served(contender, image, image_format, work / "mount") as disk:
                        before = server_of(image)
                        rate = run_fio(job, disk, size_mib * MIB, 0)
                        each = (server_of(image).cpu_seconds - before.cpu_seconds) / writes * 1e6
                    shutil.rmtree(work / "mount")
                    result = seen.setdefault(contender.name, Seen())
                    result.rates.append(rate)
                    result.cpu_microseconds.append(each)
                    print(f"  {title}: {contender.name}: {rate:.0f}, {each:.0f} us of CPU each", file=sys.stderr)
            for name, result in seen.items():
                rate, each = statistics.median(result.rates), statistics.median(result.cpu_microseconds)
                rows.append({"job": title, "who": name, "writes_a_second": round(rate), "cpu_us": round(each, 1)})
    return rows


def main() -> int:
    """Run, print, save."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.mount_writes", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--size", type=int, default=512, metavar="MIB", help="of the disk, an eighth of which is written"
    )
    parser.add_argument("--only", default="", help="only works whose name contains this")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where to put the images")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tapfs-bench-", dir=arguments.work) as folder:
        rows = measure(Path(folder), arguments.size, arguments.rounds, arguments.only)
    for row in rows:
        who = f"{row['job']:<36} {row['who']:<26}"
        print(f"{who} {row['writes_a_second']:>8} a second {row['cpu_us']:>7} us of CPU each")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
