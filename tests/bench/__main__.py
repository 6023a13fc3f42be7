"""`python -m tests.bench`: tapfs against qemu-img on the same images in the same run."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

from tests.bench.runner import TAPFS, Job, qemu_backports, run_jobs

MIB = 1 << 20


def make_source(path: Path, size_mib: int) -> None:
    """One third zeros, one third text, one third random, in turns of a MiB."""
    generator = random.Random(2006)
    words = [bytes(generator.choices(b"abcdefghijklmnopqrstuvwxyz", k=generator.randint(2, 9))) for _ in range(4000)]
    with path.open("wb") as file:
        for number in range(size_mib):
            if number % 3 == 0:
                file.write(bytes(MIB))
            elif number % 3 == 1:
                text = b" ".join(generator.choices(words, k=MIB // 5))
                file.write((text * 2)[:MIB])
            else:
                file.write(generator.randbytes(MIB))


def peers() -> dict[str, str]:
    """The qemu-img programs to compare with: the system's, that of Debian's backports, and what $QEMU_IMG names."""
    system = shutil.which("qemu-img")
    if system is None:
        raise SystemExit("bench: qemu-img is missing; scripts/system-packages test installs it")
    found = {_version(system): system}
    backports = qemu_backports()
    if backports is not None:
        newer = str(backports / "qemu-img")
        found[_version(newer)] = newer
    if (further := os.environ.get("QEMU_IMG")) is not None:
        found[_version(further)] = further
    return found


def _version(program: str) -> str:
    words = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.split()
    return f"qemu-img {words[2]}"


def jobs(work: Path, size_mib: int, qemus: dict[str, str]) -> list[Job]:
    """The rows of issue 2: convert both ways, compressed, info, and opening a huge sparse image."""
    tapfs = TAPFS
    raw, qcow, packed, huge, out = (
        str(work / name) for name in ("src.raw", "src.qcow", "packed.qcow", "huge.qcow", "out")
    )
    make_source(Path(raw), size_mib)
    newest = list(qemus.values())[-1]
    subprocess.run([newest, "convert", "-f", "raw", "-O", "qcow", raw, qcow], check=True)
    # qemu-img ends a compressed conversion to qcow with status 1 and no message; the image is right.
    subprocess.run([newest, "convert", "-f", "raw", "-O", "qcow", "-c", raw, packed], check=False)
    subprocess.run([newest, "compare", "-q", "-f", "raw", "-F", "qcow", raw, packed], check=True)
    subprocess.run([newest, "create", "-q", "-f", "qcow", huge, "2T"], check=True)

    def convert(source_format: str, target_format: str, source: str, *extra: str) -> dict[str, list[str]]:
        words = ["convert", "-f", source_format, "-O", target_format, *extra, source, out]
        return {name: [program, *words] for name, program in {"tapfs": tapfs, **qemus}.items()}

    def info(source: str) -> dict[str, list[str]]:
        return {name: [program, "info", source] for name, program in {"tapfs": tapfs, **qemus}.items()}

    read_huge = f"import tapfs\nwith tapfs.open({huge!r}) as disk: disk.read((1 << 40) + 4096, 4096)"
    clean = partial(Path(out).unlink, missing_ok=True)
    return [
        Job("raw to qcow", convert("raw", "qcow", raw), clean, "5x, < 150 MiB"),
        Job("qcow to raw", convert("qcow", "raw", qcow), clean, "4x, < 150 MiB"),
        Job("raw to qcow -c", convert("raw", "qcow", raw, "-c"), clean, statuses=(0, 1)),
        Job("qcow -c to raw", convert("qcow", "raw", packed), clean),
        Job("info", info(qcow), goal="< 0.15 s"),
        Job("info, 2 TiB sparse qcow", info(huge), goal="< 0.2 s, < 64 MiB"),
        Job("open and read, 2 TiB sparse qcow", {"tapfs": [sys.executable, "-c", read_huge]}, goal="< 0.2 s, < 64 MiB"),
    ]


def main() -> int:
    """Run the benchmarks and print the table."""
    return run_jobs(jobs, peers(), target="make bench", description=__doc__, size=1024, unit="MIB")


if __name__ == "__main__":
    sys.exit(main())
