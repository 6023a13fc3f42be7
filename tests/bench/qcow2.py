"""`python -m tests.bench.qcow2`: qcow2 images converted and checked, tapfs against qemu-img in the same run.

The disk is the mixed one of `make bench` (a third zeros, a third text, a third random), a fragmented one, and one of
1 TiB with all its 16 million clusters. tapfs ends with fdatasync; a contender "qemu-img …, synced" does so, too.
The contender "the least" is bound.c: the same reads, writes and library calls in two threads, without tapfs.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tests.bench.__main__ import make_source, peers
from tests.bench.ring import build
from tests.bench.runner import TAPFS, Job, run_jobs, synced
from tests.scattered_qcow2 import scattered_qcow2, stepped

GIB = 1 << 30
TIB = 1 << 40
FRAGMENTED_BITS = 12
#: Of the fragmented disk: 6 % of its clusters.
FRAGMENTED_SIZE, FRAGMENTED_CLUSTERS = 8 * GIB, 126_000
HUGE_CLUSTERS = TIB >> 16
SCATTERED_CLUSTERS = 1 << 20


def jobs(work: Path, size_mib: int, qemus: dict[str, str]) -> list[Job]:
    """The rows of issue 11 that are whole commands; tests.bench.mount_reads has those of mounts."""
    tapfs = TAPFS
    name, newest = list(qemus.items())[-1]
    out = work / "out"

    def run(*words: str | Path) -> None:
        subprocess.run([newest, *words], check=True)

    raw = work / "mixed.raw"
    make_source(raw, size_mib)
    plain, zlib, zstd = (work / f"{kind}.qcow2" for kind in ("plain", "zlib", "zstd"))
    for image, options in ((plain, []), (zlib, ["-c"]), (zstd, ["-c", "-o", "compression_type=zstd"])):
        run("convert", "-f", "raw", "-O", "qcow2", *options, raw, image)
    fragmented, sparse = work / "fragmented.qcow2", work / "fragmented.raw"
    chosen = stepped(FRAGMENTED_CLUSTERS, FRAGMENTED_SIZE >> FRAGMENTED_BITS)
    scattered_qcow2(fragmented, FRAGMENTED_SIZE, chosen, cluster_bits=FRAGMENTED_BITS, data=True)
    run("convert", "-f", "qcow2", "-O", "raw", fragmented, sparse)
    huge, scattered = work / "huge.qcow2", work / "scattered.qcow2"
    scattered_qcow2(huge, TIB, range(HUGE_CLUSTERS))
    scattered_qcow2(scattered, TIB, stepped(SCATTERED_CLUSTERS, HUGE_CLUSTERS))

    def same(*words: str | Path) -> dict[str, list[str]]:
        return {who: [program, *map(str, words)] for who, program in {"tapfs": tapfs, **qemus}.items()}

    def converted(source: Path, target: str, *options: str) -> dict[str, list[str]]:
        words = ["convert", "-f", source.suffix.removeprefix("."), "-O", target, *options, str(source), str(out)]
        return {**same(*words), f"{name}, synced": synced([newest, *words], out)}

    clean = partial(out.unlink, missing_ok=True)

    bound = str(build(work, "bound", "-ldeflate", "-lzstd", "-lpthread"))

    def convert(
        title: str, goal: str, source: Path, target: str, *options: str, least: Sequence[str] | None = None
    ) -> Job:
        contenders = converted(source, target, *options)
        if least is not None:
            way, codec = least
            contenders["the least"] = [bound, way, str(source), str(out), codec]
        return Job(title, contenders, clean, goal, output=out)

    def opened(image: Path) -> dict[str, list[str]]:
        program = "import sys, tapfs; tapfs.open(sys.argv[1], writable=True).close()"
        return {
            "tapfs": [sys.executable, "-c", program, str(image)],
            **{who: [qemu_io(path), "-c", "q", str(image)] for who, path in qemus.items()},
        }

    small = ("-o", f"cluster_size={1 << FRAGMENTED_BITS}")
    return [
        convert("raw to qcow2", "1x", raw, "qcow2"),
        convert("qcow2 to raw", "1x", plain, "raw"),
        convert("raw to qcow2 -c, zlib", "4x, no larger", raw, "qcow2", "-c"),
        convert(
            "raw to qcow2 -c, zstd", "2x", raw, "qcow2", "-c", "-o", "compression_type=zstd", least=("pack", "zstd")
        ),
        convert("qcow2 of zlib to raw", "2x", zlib, "raw", least=("unpack", "zlib")),
        convert("qcow2 of zstd to raw", "2x", zstd, "raw", least=("unpack", "zstd")),
        convert("fragmented: qcow2 to raw", "2x", fragmented, "raw", least=("unpack", "none")),
        convert("fragmented: raw to qcow2", "2x", sparse, "qcow2", *small),
        Job("check, 16 million clusters", same("check", "-f", "qcow2", huge), goal="1x, no more memory"),
        # QEMU's check looks up each cluster's refcount in a cache of four blocks.
        Job("check, a million in random order", same("check", "-f", "qcow2", scattered), goal="1x, no more memory"),
        Job("opened for writing, 16 million clusters", opened(huge)),
        Job("opened for writing, a million in random order", opened(scattered)),
    ]


def qemu_io(qemu_img: str) -> str:
    """The qemu-io beside a qemu-img."""
    return str(Path(qemu_img).with_name("qemu-io"))


def main() -> int:
    """Run the benchmarks and print the table."""
    return run_jobs(jobs, peers(), target="make bench-qcow2", description=__doc__, size=1024, unit="MIB")


if __name__ == "__main__":
    sys.exit(main())
