"""`python -m tests.bench.block_formats`: VMDK, VHD, VHDX and VDI, tapfs against the newest qemu-img in the same run.

One disk is the mixed one of `make bench`: a third zeros, a third text, a third random. The fragmented one is twice as
large, and `qemu-io` has written 6 % of its pieces of 4 KiB, in random order, to an image of each format.

tapfs ends with fdatasync. qemu-img leaves what it wrote in the page cache, so `sync -d` follows it ("synced"). Of a
conversion there are two contenders: qemu-img as it is, and with 16 coroutines that write in any order (`-m 16 -W`).
A conversion to raw has the host's calls alone as a third one (plain_copy.c, two threads): a ratio of 1 to them is the
bound.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from functools import partial
from pathlib import Path

from tests.bench.__main__ import MIB, make_source, peers
from tests.bench.ring import build
from tests.bench.runner import TAPFS, Job, run_jobs, synced

#: QEMU's names of the formats, the table's, and what `qemu-img create` is told: VHDs of the exact size.
FORMATS = {"vmdk": "vmdk", "vpc": "vhd", "vhdx": "vhdx", "vdi": "vdi"}
OPTIONS = {"vpc": ("-o", "force_size=on")}
STREAM = ("-o", "subformat=streamOptimized")
PIECE = 4096
PIECES_PERCENT = 6


def write_scattered(qemu_io: str, image: Path, image_format: str, size: int) -> None:
    """Have qemu-io write pieces all over the disk of a new image, no byte of them zero."""
    pieces = size // PIECE
    chosen = random.Random(2006).sample(range(pieces), pieces * PIECES_PERCENT // 100)
    lines = "".join(f"write -q -P {1 + piece % 255} {piece * PIECE} {PIECE}\n" for piece in chosen)
    command = [qemu_io, "-t", "unsafe", "-f", image_format, str(image)]
    subprocess.run(command, input=lines, text=True, stdout=subprocess.DEVNULL, check=True)


def plain_copy(program: Path, tapfs: str, image: Path, out: Path) -> list[str]:
    """The command that copies the pieces of an image in one file to a raw disk, by the calls of the host alone."""
    found = subprocess.run([tapfs, "map", "--json", image], stdout=subprocess.PIPE, check=True)
    runs = json.loads(found.stdout)
    pieces = image.with_name(f"{image.name}.pieces")
    places = (f"{run['start']} {run['offset']} {run['length']}\n" for run in runs if run["data"])
    pieces.write_text("".join(places))
    end = runs[-1]["start"] + runs[-1]["length"]
    return [str(program), str(pieces), str(image), str(out), str(end)]


def jobs(work: Path, size_mib: int, qemus: dict[str, str]) -> list[Job]:
    """The rows: ordered and fragmented conversions both ways, map and compare of the fragmented ones."""
    tapfs = TAPFS
    name, newest = list(qemus.items())[-1]
    program = build(work, "plain_copy")
    out, mixed, sparse = work / "out", work / "mixed.raw", work / "fragmented.raw"
    make_source(mixed, size_mib)

    def run(*words: str | Path) -> None:
        subprocess.run([newest, *words], check=True)

    def converted(title: str, goal: str, source: Path, formats: tuple[str, str], *options: str) -> Job:
        bound = formats[1] == "raw" and source != stream
        alone = {"the calls alone": plain_copy(program, tapfs, source, out)} if bound else {}
        words = ["-f", formats[0], "-O", formats[1], *options, str(source), str(out)]
        deep = [newest, "convert", "-m", "16", "-W", *words]
        return Job(
            title,
            {
                "tapfs": [tapfs, "convert", *words],
                f"{name}, synced": synced([newest, "convert", *words], out),
                f"{name} -m 16 -W, synced": synced(deep, out),
                **alone,
            },
            clean,
            goal,
            output=out,
        )

    def same(*words: str | Path) -> dict[str, list[str]]:
        return {who: [program, *map(str, words)] for who, program in (("tapfs", tapfs), (name, newest))}

    clean, stream = partial(out.unlink, missing_ok=True), work / "stream.vmdk"
    rows: list[Job] = []
    for kind, title in FORMATS.items():
        options = OPTIONS.get(kind, ())
        image, fragmented = work / f"mixed.{kind}", work / f"fragmented.{kind}"
        run("convert", "-f", "raw", "-O", kind, *options, mixed, image)
        size = 2 * size_mib * MIB
        run("create", "-q", "-f", kind, *options, fragmented, str(size))
        write_scattered(str(Path(newest).with_name("qemu-io")), fragmented, kind, size)
        if not sparse.exists():
            run("convert", "-f", kind, "-O", "raw", fragmented, sparse)
        words = ("-f", "raw", "-F", kind, sparse, fragmented)
        rows += [
            converted(f"raw to {title}", "1x", mixed, ("raw", kind), *options),
            converted(f"{title} to raw", "1x", image, (kind, "raw")),
            converted(f"fragmented: {title} to raw", "3x", fragmented, (kind, "raw")),
            converted(f"fragmented: raw to {title}", "3x", sparse, ("raw", kind), *options),
            Job(f"fragmented: map of {title}", same("map", "-f", kind, "--output=json", fragmented), goal="3x"),
            Job(f"fragmented: compare with {title}", same("compare", *words), goal="3x"),
        ]
    run("convert", "-f", "raw", "-O", "vmdk", *STREAM, mixed, stream)
    return [
        *rows,
        converted("raw to streamOptimized", "3x", mixed, ("raw", "vmdk"), *STREAM),
        converted("streamOptimized to raw", "1x", stream, ("vmdk", "raw")),
    ]


def main() -> int:
    """Run the benchmarks and print the table."""
    return run_jobs(jobs, peers(), target="make bench-blocks", description=__doc__, size=1024, unit="MIB")


if __name__ == "__main__":
    sys.exit(main())
