"""`python -m tests.bench.large_maps`: random reads by maps that are cold, do not fit, or belong to a long chain.

tapfs reads in one thread of Python, `qemu-img bench` eight requests at a time. The images hold no data, only maps: what
is read are holes of the host file, so that the time is that of finding them.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.bench.__main__ import peers
from tests.bench.random_reads import BLOCK
from tests.bench.runner import TAPFS, Job, run_jobs
from tests.scattered_images import scattered_qcow

GIB = 1 << 30
#: Bytes from one read to the next: all over the disk, never the same piece of the map twice in a row.
STEP = 2_035_007_488
#: The same over the disk of the chains.
CHAIN_STEP = 309_592_064
CHAINS = (1, 8, 30)
CHAIN_SIZE = GIB
CHAIN_READS = 100_000


def jobs(work: Path, size_gib: int, qemus: dict[str, str]) -> list[Job]:
    """The rows: a cold map, a map that does not fit the cache, chains of 1, 8 and 30 layers."""
    size = size_gib * GIB
    tapfs = TAPFS
    cold, huge = work / "cold.qcow", work / "huge.qcow"
    scattered_qcow(cold, size, (size >> 12) * 6 // 100)
    scattered_qcow(huge, 1024 * GIB, 2_000_000, cluster_bits=16)

    def reads(image: Path, count: int, step: int, layers: int = 1) -> dict[str, list[str]]:
        words = ["bench", "-f", "qcow", "-c", str(count), "-d", "8", "-s", str(BLOCK), "-S", str(step), str(image)]
        own = [sys.executable, "-m", "tests.bench.random_reads", str(image), str(count), str(step), str(layers)]
        return {"tapfs": own} | {name: [program, *words] for name, program in qemus.items()}

    def maps(image: Path, layers: int = 1) -> dict[str, list[str]]:
        words = ["map", "-f", "qcow", "--output=json"]
        own = [tapfs, *words, *("--backing-format=qcow" for _ in range(layers - 1)), str(image)]
        return {"tapfs": own} | {name: [program, *words, str(image)] for name, program in qemus.items()}

    rows = [
        Job("random reads, cold map", reads(cold, 16_000, STEP), goal="2x"),
        Job("random reads, thrashing, 1 TiB", reads(huge, 100_000, STEP), goal="2x"),
        Job("map, 1 TiB, 2 million clusters", maps(huge), goal="3x"),
        Job("check, 1 TiB, 2 million clusters", {"tapfs": [tapfs, "check", "-f", "qcow", str(huge)]}),
    ]
    for layers in CHAINS:
        top = _chain(work, layers)
        goal = "0.9 of the rate of one layer" if layers > 1 else ""
        rows += [
            Job(f"random reads, chain of {layers}", reads(top, CHAIN_READS, CHAIN_STEP, layers), goal=goal),
            Job(f"map, chain of {layers}", maps(top, layers), goal=goal),
        ]
    return rows


def _chain(work: Path, layers: int) -> Path:
    """The top of a chain whose layers have 30 % of the disk's clusters together."""
    backing = ""
    for number in range(layers):
        name = f"chain-{layers}-{number}.qcow"
        clusters = (CHAIN_SIZE >> 12) * 3 // 10 // layers
        scattered_qcow(work / name, CHAIN_SIZE, clusters, seed=number, backing=backing)
        backing = name
    return work / backing


def main() -> int:
    """Run the benchmarks and print the table."""
    return run_jobs(jobs, peers(), target="make bench-fragmented", description=__doc__, size=32, unit="GIB")


if __name__ == "__main__":
    sys.exit(main())
