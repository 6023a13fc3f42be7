"""`python -m tests.bench.faces`: qemu-img converts the faces of a mounted disk, and the images that they stand for.

The disk is one third zeros, text and noise each, in a qcow2 image on tmpfs. The program is that of Debian's backports
where that is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.__main__ import make_source
from tests.bench.mount_reads import server_of
from tests.bench.runner import TAPFS, qemu_backports

#: Formats of faces, and QEMU's names of them.
FACES = {"qcow2": "qcow2", "vhdx": "vhdx", "vmdk": "vmdk", "vdi": "vdi", "vhd": "vpc"}


def converted(qemu_img: str, image: Path, kind: str, target: Path) -> tuple[float, float]:
    """Seconds by the clock and of the program's processor time."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run([qemu_img, "convert", "-f", kind, "-O", "raw", image, target], check=True)
    seconds, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    target.unlink()
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(work: Path, size_mib: int, rounds: int) -> list[dict[str, object]]:
    """A row for each format: medians of the seconds of a face and of an image, and of the server's processor time."""
    folder = qemu_backports()
    qemu_img = "qemu-img" if folder is None else str(folder / "qemu-img")
    tapfs = TAPFS
    raw, image, mountpoint = work / "source.raw", work / "source.qcow2", work / "mount"
    make_source(raw, size_mib)
    subprocess.run([tapfs, "convert", "-f", "raw", "-O", "qcow2", raw, image], check=True)
    raw.unlink()
    mountpoint.mkdir()
    rows: list[dict[str, object]] = []
    for name, kind in FACES.items():
        real, seen = work / f"real.{name}", list[tuple[float, ...]]()
        subprocess.run([tapfs, "convert", "-O", name, image, real], check=True)
        for _ in range(rounds):
            subprocess.run([tapfs, "mount", "--as", name, image, mountpoint], check=True)
            os.stat(mountpoint / f"disk.{name}")
            before = server_of(image).cpu_seconds
            face = converted(qemu_img, mountpoint / f"disk.{name}", kind, work / "out")
            server = server_of(image).cpu_seconds - before
            subprocess.run([tapfs, "umount", mountpoint], check=True)
            seen.append((*face, server, *converted(qemu_img, real, kind, work / "out")))
        real.unlink()
        figures = (round(statistics.median(column), 2) for column in zip(*seen, strict=True))
        keys = ("face_seconds", "face_cpu", "server_cpu", "image_seconds", "image_cpu")
        rows.append({"format": name, **dict(zip(keys, figures, strict=True))})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """Measure, and print the rows."""
    parser = argparse.ArgumentParser(description="qemu-img convert of faces against that of real images")
    parser.add_argument("--size", type=int, default=1024, metavar="MIB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="tapfs-faces-") as work:
        rows = measure(Path(work), arguments.size, arguments.rounds)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
