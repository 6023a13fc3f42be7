"""Images that were damaged at random: whatever is asked of one, it works or an ImageError says why not.

Each image is looked at, mapped, checked, read, written and repaired. Memory is bounded by the caller's limits; any
other exception, a crash of the process or an endless loop fails the run.
"""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import tapfs
from tapfs.errors import ImageError
from tapfs.jobs.create import NewImage
from tapfs.testing.hostile import damage

_SIZE = 2 << 20
_PASSWORD = b"secret"

_LIMIT = 4 << 20  # how far into a disk, however large it says that it is


class Mutations:
    """Good images, and damaged copies of them. Both follow from the seed."""

    def __init__(self, seed: int, folder: Path) -> None:
        self._choice = random.Random(seed)
        self._folder = folder
        self._path = folder / "image"
        self._seeds = [self._written(options) for options in ({}, {"cluster_size": "512"}, {"blktap": "on"})]
        self._seeds += [self._compressed(), self._encrypted(), self._overlay()]
        self._seeds += [_partitioned(folder, label) for label in ("dos", "gpt")]
        self._seeds += [
            self._written({"block_size": "16384"}, format_name="vhd"),
            self._written({"subformat": "fixed"}, format_name="vhd"),
            self._overlay(format_name="vhd"),
            self._written({"block_size": "1M"}, format_name="vhdx"),
            self._written({"block_size": "1M", "subformat": "fixed"}, format_name="vhdx"),
            self._overlay(format_name="vhdx", parent_format="vhdx"),
            self._written({}, format_name="vdi"),
            self._written({"static": "on"}, format_name="vdi"),
            self._overlay(format_name="vdi", parent_format="vdi"),
            self._written({}, format_name="vmdk"),
            self._written({"zeroed_grain": "on"}, format_name="vmdk"),
            self._streamed(),
        ]

    def next_image(self) -> Path:
        """The next damaged image, at the same path as the last."""
        image = bytearray(self._choice.choice(self._seeds))
        for _ in range(self._choice.choice([1, 1, 2, 4, 10])):
            damage(image, self._choice)
        self._path.write_bytes(image)
        return self._path

    def use(self, path: Path) -> list[str]:
        """Do everything to an image; the kinds of the errors that it gave."""
        uses: tuple[Callable[[Path], None], ...] = (_look, _map, tapfs.check, _read, self._write, tapfs.repair)  # type: ignore[assignment]
        kinds: list[str] = []
        for use in uses:
            try:
                use(path)
            except ImageError as error:
                kinds.append(error.kind.value)
        return kinds

    def _write(self, path: Path) -> None:
        disk = tapfs.open(path, writable=True, password=_PASSWORD)
        try:
            for _ in range(6):
                offset, length = self._range(disk)
                what = self._choice.random()
                if what < 0.6:
                    disk.write(offset, b"w" * length)
                    disk.read(offset, length)
                elif what < 0.8:
                    disk.write_zeroes(offset, length)
                else:
                    disk.discard(offset, length)
            disk.flush()
        finally:
            disk.abandon()

    def _range(self, disk: tapfs.Image) -> tuple[int, int]:
        offset = self._choice.randrange(max(1, min(disk.size, _LIMIT)))
        return offset, min(disk.size - offset, self._choice.randrange(1, 70000))

    # Good images

    def _written(self, options: dict[str, str], *, format_name: str = "qcow", **new: object) -> bytes:
        path = self._folder / "seed"
        path.unlink(missing_ok=True)
        tapfs.create(str(path), format_name, _SIZE, options=options, **new)  # type: ignore[arg-type]
        with tapfs.open(path, format=format_name, writable=True, password=_PASSWORD) as disk:
            for _ in range(12):
                offset = self._choice.randrange(_SIZE - 9000)
                disk.write(offset, bytes([self._choice.randrange(256)]) * self._choice.randrange(1, 9000))
        return path.read_bytes()

    def _encrypted(self) -> bytes:
        return self._written({}, password=_PASSWORD)

    def _overlay(self, *, format_name: str = "qcow", parent_format: str = "raw") -> bytes:
        parent, source = self._folder / f"parent.{parent_format}", self._folder / "source"
        source.write_bytes(self._choice.randbytes(_SIZE // 2))
        tapfs.convert(source, parent, format="raw", target_format=parent_format)
        return self._written({}, format_name=format_name, backing=str(parent), backing_format=parent_format)

    def _streamed(self) -> bytes:
        """A packed VMDK."""
        raw, path = self._folder / "source", self._folder / "seed"
        raw.write_bytes(b"packed" * (_SIZE // 6))
        path.unlink(missing_ok=True)
        tapfs.convert(raw, path, format="raw", target_format="vmdk", options={"subformat": "streamOptimized"})
        return path.read_bytes()

    def _compressed(self) -> bytes:
        from tapfs.jobs.convert import convert_to_new

        source, path = self._folder / "source", self._folder / "compressed"
        source.write_bytes(b"abc" * 100_000 + bytes(100_000) + b"x" * 50_000)
        with tapfs.open(source, format="raw") as disk:
            convert_to_new(disk, str(path), NewImage("qcow", disk.size), compressed=True)
        return path.read_bytes()


def _partitioned(folder: Path, label: str) -> bytes:
    path = folder / label
    with path.open("wb") as file:
        file.truncate(_SIZE)
    lines = [
        f"label: {label}",
        "start=64, size=512",
        "start=1024, size=512",
        *(["start=2048, type=5"] * (label == "dos")),
    ]
    lines += ["start=2112, size=256"] * (label == "dos")
    command = ["sfdisk", "-q", "--no-reread", "--no-tell-kernel", path]
    subprocess.run(command, input="\n".join(lines).encode(), check=True)
    return path.read_bytes()


def _look(path: Path) -> None:
    with tapfs.open(path, metadata_only=True) as disk:
        _ = disk.info


def _map(path: Path) -> None:
    with tapfs.open(path, metadata_only=True) as disk:
        for _ in islice(disk.extents(0, min(disk.size, 1 << 32)), 1000):
            pass


def _read(path: Path) -> None:
    with tapfs.open(path, password=_PASSWORD) as disk:
        for offset in range(0, min(disk.size, _LIMIT), _LIMIT // 6):
            disk.read(offset, min(disk.size - offset, 70000))


def run(seed: int, images: int, folder: Path) -> str:
    """That many images; an exception that is no ImageError comes out as it is, with the image kept in `folder`."""
    mutations = Mutations(seed, folder)
    kinds: dict[str, int] = {}
    for number in range(images):
        path = mutations.next_image()
        image = path.read_bytes()
        try:
            met = mutations.use(path)
        except Exception as error:
            kept = folder.parent / f"mutated-{seed}-{number}"
            kept.write_bytes(image)
            error.add_note(f"image {number} of seed {seed}, kept as {kept}")
            raise
        for kind in met:
            kinds[kind] = kinds.get(kind, 0) + 1
    return f"{images} images, {dict(sorted(kinds.items()))}"
