"""`python -m tests.bench.fragmented`: fragmented images, tapfs against qemu-img in the same run.

The image is what a disk looks like after years: a few percent of its 4 KiB clusters, allocated in random order.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.bench.__main__ import peers
from tests.bench.runner import TAPFS, Job, run_jobs
from tests.scattered_images import scattered_qcow

GIB = 1 << 30
CLUSTER_BITS = 12


def jobs(work: Path, size_gib: int, qemus: dict[str, str]) -> list[Job]:
    """The rows: convert both ways, map and compare of one image, and check of one with a million clusters."""
    size = size_gib * GIB
    tapfs = TAPFS
    image, raw, out = (str(work / name) for name in ("frag.qcow", "frag.raw", "out"))
    scattered_qcow(Path(image), size, (size >> CLUSTER_BITS) * 6 // 100, data=True)
    subprocess.run([tapfs, "convert", "-f", "qcow", "-O", "raw", image, raw], check=True)
    every = {"tapfs": tapfs, **qemus}
    clean: Callable[[], None] = lambda: Path(out).unlink(missing_ok=True)  # noqa: E731

    def same(*words: str) -> dict[str, Sequence[str]]:
        return {name: [program, *words] for name, program in every.items()}

    def copied(*words: str) -> dict[str, Sequence[str]]:
        """By each program, by qemu-img with all that makes it quicker, too, and the same bytes by cp."""
        deep = {f"{name} -m 16 -W": [program, "convert", "-m", "16", "-W", *words] for name, program in qemus.items()}
        return {**same("convert", *words), **deep, "cp": ["cp", "--sparse=always", raw, out]}

    million = str(work / "million.qcow")
    scattered_qcow(Path(million), 64 * GIB, 1_000_000, data=False)
    return [
        Job("qcow to raw", copied("-f", "qcow", "-O", "raw", image, out), clean, "3x; cp 0.67x"),
        Job("map", same("map", "-f", "qcow", "--output=json", image), goal="3x"),
        Job("raw to qcow", copied("-f", "raw", "-O", "qcow", raw, out), clean, "3x; cp 0.67x"),
        Job("compare", same("compare", "-f", "raw", "-F", "qcow", raw, image), goal="3x"),
        Job("check, a million clusters", {"tapfs": [tapfs, "check", "-f", "qcow", million]}, goal="< 0.5 s"),
    ]


def main() -> int:
    """Run the benchmarks and print the table."""
    return run_jobs(jobs, peers(), target="make bench-fragmented", description=__doc__, size=32, unit="GIB")


if __name__ == "__main__":
    sys.exit(main())
