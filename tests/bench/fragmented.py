"""`python -m tests.bench.fragmented`: fragmented images, tapfs against qemu-img in the same run.

The image is what a disk looks like after years: a few percent of its 4 KiB clusters, allocated in random order.
"""

from __future__ import annotations

import random
import struct
import subprocess
import sys
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.bench.__main__ import peers
from tests.bench.runner import Job, run_jobs

GIB = 1 << 30
CLUSTER_BITS = 12
CLUSTER = 1 << CLUSTER_BITS
L2_BITS = CLUSTER_BITS - 3
MAGIC = 0x514649FB
L1_AT = 48


def scattered_qcow(path: Path, size: int, clusters: int, *, data: bool, seed: int = 1) -> None:
    """A qcow image of `size` bytes with so many clusters, allocated in random order, as a guest's writes do it.

    With `data` each allocated cluster begins with its own number; without, it is a hole of the host file.
    """
    count, per_table = size >> CLUSTER_BITS, 1 << L2_BITS
    chosen = random.Random(seed).sample(range(count), clusters)
    l1 = array("Q", bytes(8 * -(-count // per_table)))
    tables: dict[int, array[int]] = {}
    end = -(-(L1_AT + 8 * len(l1)) // CLUSTER) * CLUSTER
    for cluster in chosen:
        index = cluster >> L2_BITS
        if index not in tables:
            l1[index], tables[index] = end, array("Q", bytes(8 * per_table))
            end += CLUSTER
        tables[index][cluster & (per_table - 1)] = end
        end += CLUSTER
    with path.open("wb") as file:
        file.truncate(end)
        file.write(struct.pack(">IIQIIQBBHIQ", MAGIC, 1, 0, 0, 0, size, CLUSTER_BITS, L2_BITS, 0, 0, L1_AT))
        file.write(_big_endian(l1))
        for index, entries in tables.items():
            file.seek(l1[index])
            file.write(_big_endian(entries))
        filling = bytes(range(1, 256)) * 17
        for cluster in chosen if data else ():
            file.seek(tables[cluster >> L2_BITS][cluster & (per_table - 1)])
            file.write(cluster.to_bytes(8, "big") + filling[: CLUSTER - 8])


def _big_endian(entries: array[int]) -> bytes:
    copy = entries[:]
    if sys.byteorder == "little":
        copy.byteswap()
    return copy.tobytes()


def jobs(work: Path, size_gib: int, qemus: dict[str, str]) -> list[Job]:
    """The rows: convert both ways, map, compare and check of one image."""
    size = size_gib * GIB
    tapfs = str(Path(sys.executable).with_name("tapfs"))
    image, raw, out = (str(work / name) for name in ("frag.qcow", "frag.raw", "out"))
    scattered_qcow(Path(image), size, (size >> CLUSTER_BITS) * 6 // 100, data=True)
    subprocess.run([tapfs, "convert", "-f", "qcow", "-O", "raw", image, raw], check=True)
    every = {"tapfs": tapfs, **qemus}
    clean: Callable[[], None] = lambda: Path(out).unlink(missing_ok=True)  # noqa: E731

    def same(*words: str) -> dict[str, Sequence[str]]:
        return {name: [program, *words] for name, program in every.items()}

    return [
        Job("qcow to raw", same("convert", "-f", "qcow", "-O", "raw", image, out), clean, "3x"),
        Job("map", same("map", "-f", "qcow", "--output=json", image), goal="3x"),
        Job("raw to qcow", same("convert", "-f", "raw", "-O", "qcow", raw, out), clean, "3x"),
        Job("compare", same("compare", "-f", "raw", "-F", "qcow", raw, image), goal="3x"),
        Job("check", {"tapfs": [tapfs, "check", "-f", "qcow", image]}, goal="< 0.5 s for a million clusters"),
    ]


def main() -> int:
    """Run the benchmarks and print the table."""
    return run_jobs(jobs, peers(), target="make bench-fragmented", description=__doc__, size=32, unit="GIB")


if __name__ == "__main__":
    sys.exit(main())
