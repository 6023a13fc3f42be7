"""Chains of images under commands that power failures cut off: commit and rebase, with any seed.

The order of writes to the files is what strace saw. After each crash the overlay's disk is the same.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path

import tapfs
from tests.crash.recorded import crashes_of_files, record_files

SIZE = 2 << 20

#: Format and options of base and overlay.
CHAINS: dict[str, tuple[str, dict[str, str], str, dict[str, str]]] = {
    "qcow2 over raw": ("raw", {}, "qcow2", {}),
    "qcow2 over qcow2": ("qcow2", {"cluster_size": "4096"}, "qcow2", {}),
    "qcow over qcow2 with subclusters": ("qcow2", {"extended_l2": "on", "cluster_size": "16384"}, "qcow", {}),
    "qcow2 with subclusters over raw": ("raw", {}, "qcow2", {"extended_l2": "on", "cluster_size": "16384"}),
    "qcow2 with a data file over raw": ("raw", {}, "qcow2", {"data_file": "outside", "cluster_size": "4096"}),
    "qcow2 of version 2 over qcow": ("qcow", {}, "qcow2", {"compat": "0.10"}),
    "vmdk over vmdk": ("vmdk", {}, "vmdk", {}),
    "vhd over vhd": ("vhd", {"block_size": "65536"}, "vhd", {"block_size": "65536"}),
    "vdi over vdi": ("vdi", {}, "vdi", {}),
    "vhdx over vhdx": ("vhdx", {"block_size": "1M"}, "vhdx", {"block_size": "1M"}),
}

#: Chains whose overlays pack what a rebase writes.
PACKED = {"qcow2 with subclusters over raw"}


def scribble(path: Path, format_name: str, base_format: str, choice: random.Random, count: int) -> None:
    with tapfs.open(path, format=format_name, writable=True, backing_formats=[base_format]) as disk:
        for _ in range(count):
            offset = choice.randrange(SIZE // 512) * 512
            length = min(choice.choice([512, 4096, 70000]), SIZE - offset)
            if choice.random() < 0.3:
                disk.write_zeroes(offset, length)
            else:
                disk.write(offset, choice.randbytes(length))


def content(path: Path, format_name: str, parents: list[str]) -> bytes:
    with tapfs.open(path, format=format_name, backing_formats=parents) as disk:
        return disk.read(0, disk.size)


def make_chain(folder: Path, kind: str, choice: random.Random) -> tuple[Path, Path]:
    base_format, base_options, over_format, over_options = CHAINS[kind]
    base, over = folder / "base.img", folder / "over.img"
    tapfs.create(base, base_format, SIZE, options=base_options)
    scribble(base, base_format, base_format, choice, 25)
    tapfs.create(over, over_format, SIZE, backing="base.img", backing_format=base_format, options=over_options)
    scribble(over, over_format, base_format, choice, 25)
    return base, over


def files_of(over: Path, kind: str) -> list[Path]:
    """The overlay's own files."""
    name = CHAINS[kind][3].get("data_file")
    return [over] if name is None else [over, over.with_name(name)]


def crash_everywhere(folder: Path, words: list[str], images: list[Path], look: Callable[[int], None], seed: str) -> int:
    """Run tapfs with the words; after each crash the images hold what it left, and `look` gets its number.

    The result is the number of crashes.
    """
    starts = [path.read_bytes() for path in images]
    command = [sys.executable, "-m", "tapfs.cli", *words]
    events = record_files(command, images, folder / "strace.log")
    for path, start in zip(images, starts, strict=True):
        path.write_bytes(start)
    count = 0
    for number, left in crashes_of_files(starts, events, random.Random(seed), tries=3):
        for path, data in zip(images, left, strict=True):
            path.write_bytes(data)
        look(number)
        count += 1
    assert count > 8
    return count


def commit(folder: Path, kind: str, seed: str) -> int:
    """Power failures in a commit leave the overlay's disk as it was; how many there were."""
    base_format, _, over_format, _ = CHAINS[kind]
    base, over = make_chain(folder, kind, random.Random(seed))
    before = content(over, over_format, [base_format])

    def look(number: int) -> None:
        assert content(over, over_format, [base_format]) == before, number
        for path, name in ((base, base_format), (over, over_format)):
            if name != "raw":
                assert not tapfs.check(path, format=name).corruptions, number

    words = ["commit", "-q", "-f", over_format, "--backing-format", base_format, str(over)]
    return crash_everywhere(folder, words, [base, *files_of(over, kind)], look, seed)


def rebase(folder: Path, kind: str, seed: str) -> int:
    """Power failures in a rebase leave the disk as it was; how many there were."""
    choice = random.Random(seed)
    base_format, base_options, over_format, _ = CHAINS[kind]
    _, over = make_chain(folder, kind, choice)
    other = folder / "another-with-a-longer-name.img"
    tapfs.create(other, base_format, SIZE, options=base_options)
    scribble(other, base_format, base_format, choice, 25)
    before = content(over, over_format, [base_format])

    def look(number: int) -> None:
        assert content(over, over_format, [base_format]) == before, number
        assert not tapfs.check(over, format=over_format).corruptions, number

    words = ["rebase", "-q", "-f", over_format, "--backing-format", base_format, *(["-c"] if kind in PACKED else [])]
    words += ["-b", other.name, "-F", base_format, str(over)]
    return crash_everywhere(folder, words, files_of(over, kind), look, seed)
