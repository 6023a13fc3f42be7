"""The survey of 2,000 images on one processor, beside a shell loop over `qemu-img info --output=json`.

Both are bound to one processor, and their processor time is compared, for a busy machine stretches the clock of the one
that starts 2,000 processes. `make bench-survey`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

IMAGES = 2000


#: The loop goes over every so many-th image: its cost is the same for each.
SAMPLED = 10

#: The sets of images: of one format, and of those that are met beside each other.
SETS = {"qcow2, one in ten an overlay": ("qcow2",), "qcow2, VMDK, VHDX, VDI": ("qcow2", "vmdk", "vhdx", "vdi")}


def make_images(folder: Path, count: int, kinds: tuple[str, ...]) -> None:
    """Images of 1 GiB, made by qemu-img once and copied; one in ten is an overlay."""
    models = [folder / f"model.{kind}" for kind in kinds]
    for model in models:
        subprocess.run(["qemu-img", "create", "-q", "-f", model.suffix[1:], model, "1G"], check=True)
    overlay = folder / "model-overlay.qcow2"
    words = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", models[0].name, "-F", "qcow2", overlay]
    subprocess.run(words, check=True)
    for number in range(count - len(models) - 1):
        model = overlay if number % 10 == 9 else models[number % len(models)]
        shutil.copyfile(model, folder / f"image{number:05}{model.suffix}")


def processor_seconds(words: list[str]) -> float:
    """The processor time of a command and of all that it starts, on one processor."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    first = min(os.sched_getaffinity(0))
    command = ["taskset", "-c", str(first), *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--only", help="accepted: there is one row")
    arguments = parser.parse_args()
    results = {name: measured(kinds, arguments.images, arguments.rounds) for name, kinds in SETS.items()}
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=2))
    return 0


def measured(kinds: tuple[str, ...], images: int, rounds: int) -> dict[str, float]:
    """Images a second of processor time, medians; prints them, and the ratios to the loop."""
    tapfs = str(Path(sys.executable).parent / "tapfs")
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-survey-") as name:
        folder = Path(name)
        make_images(folder, images, kinds)
        sample = sorted(folder.iterdir())[::SAMPLED]
        qemu = os.environ.get("QEMU_IMG", "qemu-img")
        survey = [tapfs, "survey", name, "--jobs", "1", "--to", "jsonl"]
        loop = f'for f in "$@"; do {qemu} info -U --output=json "$f"; done'
        for _ in range(rounds):
            for way, words, count in (
                ("qemu-img in a loop", ["sh", "-c", loop, "sh", *map(str, sample)], len(sample)),
                ("tapfs survey", survey, images),
                ("tapfs survey --content", [*survey, "--content"], images),
            ):
                rates.setdefault(way, []).append(count / processor_seconds(words))
    medians = {way: statistics.median(values) for way, values in rates.items()}
    print(f"{images} images: {', '.join(kinds)}")
    for way, rate in medians.items():
        print(f"  {way:<26}{rate:8.0f} images/s   {rate / medians['qemu-img in a loop']:6.1f}x")
    return medians


if __name__ == "__main__":
    sys.exit(main())
