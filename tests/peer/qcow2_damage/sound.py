"""Sound qcow2 images of many kinds, which the damages begin with: a kind has the same tables each time it is made.

Only the key of an encrypted image is by chance.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import tapfs
from tests.peer.qcow2_damage.anatomy import SUBCLUSTERS, ZERO, Anatomy

PASSWORD = b"secret"
IMAGE, DATA_FILE, PARENT = "image", "outside", "parent"

_KIB = 1 << 10


@dataclass(frozen=True)
class Kind:
    """How an image is made: options of creation, and what it has besides data."""

    options: Mapping[str, str] = field(default_factory=dict[str, str])
    packed: bool = False
    snapshots: int = 0
    bitmaps: int = 0
    parent: bool = False

    @property
    def cluster(self) -> int:
        """Bytes of a cluster."""
        return int(self.options.get("cluster_size", "65536"))

    @property
    def size(self) -> int:
        """Bytes of the disk, which ends inside a cluster."""
        return max(1 << 20, 6 * self.cluster) + 33 * 512

    @property
    def encrypted(self) -> bool:
        """Whether a password is needed."""
        return any(option.startswith("encrypt.") for option in self.options)


def _of(options: str, **more: object) -> Kind:
    words = [word.split("=") for word in options.split(",") if word]
    return Kind(dict(words), **more)  # type: ignore[arg-type]


KINDS: dict[str, Kind] = {
    "plain": _of("", snapshots=1, bitmaps=1),
    "4096": _of("cluster_size=4096", packed=True, snapshots=2, bitmaps=2),
    "512": _of("cluster_size=512", snapshots=1, bitmaps=1),
    "2M": _of("cluster_size=2097152", snapshots=1),
    "version 2": _of("compat=0.10,cluster_size=4096", snapshots=2, packed=True),
    "version 2 of 64 KiB": _of("compat=0.10"),
    "1 bit": _of("refcount_bits=1,cluster_size=4096", bitmaps=1),
    "4 bits": _of("refcount_bits=4,cluster_size=1024", snapshots=1),
    "8 bits": _of("refcount_bits=8,cluster_size=4096", snapshots=1),
    "64 bits": _of("refcount_bits=64,cluster_size=512", snapshots=1),
    "zstd": _of("compression_type=zstd,cluster_size=16384", packed=True, snapshots=1),
    "subclusters": _of("extended_l2=on,cluster_size=16384", snapshots=1, bitmaps=1),
    "packed subclusters": _of("extended_l2=on,cluster_size=32768", packed=True),
    "data file": _of(f"data_file={DATA_FILE},cluster_size=4096"),
    "subclusters in a data file": _of(f"data_file={DATA_FILE},extended_l2=on,cluster_size=16384"),
    "LUKS": _of("encrypt.iter-time=1,cluster_size=65536", snapshots=1),
    "overlay": _of("cluster_size=4096", parent=True, snapshots=1, bitmaps=1),
    "lazy": _of("lazy_refcounts=on,cluster_size=8192", snapshots=1),
}


@cache
def sound(name: str) -> Mapping[str, bytes]:
    """The files of an image of a kind, by their names."""
    kind, choice = KINDS[name], random.Random(name)
    with TemporaryDirectory(prefix="tapfs-damage-") as folder:
        _make(kind, choice, Path(folder))
        files = {each.name: each.read_bytes() for each in Path(folder).iterdir() if each.name != "source"}
    data = bytearray(files[IMAGE])
    _add_zeros(data)
    return files | {IMAGE: bytes(data)}


def _make(kind: Kind, choice: random.Random, folder: Path) -> None:
    image, source = folder / IMAGE, folder / "source"
    options = dict(kind.options)
    password = PASSWORD if kind.encrypted else None
    if kind.packed:
        pieces = [bytes(kind.cluster), b"text " * (kind.cluster // 5 + 1), choice.randbytes(kind.cluster)]
        content = b"".join(choice.choice(pieces)[: kind.cluster] for _ in range(kind.size // kind.cluster + 1))
        source.write_bytes(content[: kind.size])
        tapfs.convert(source, image, format="raw", target_format="qcow2", compressed=True, options=options)
    else:
        if kind.parent:
            (folder / PARENT).write_bytes(choice.randbytes(kind.size // 2))
        backing, its_format = (PARENT, "raw") if kind.parent else (None, None)
        tapfs.create(
            image, "qcow2", kind.size, backing=backing, backing_format=its_format, options=options, password=password
        )
    for number in range(kind.bitmaps):
        tapfs.add_bitmap(image, f"bitmap{number}", granularity=65536)
    _write(kind, choice, image, 6)
    for number in range(kind.snapshots):
        tapfs.create_snapshot(image, f"snapshot{number}")
        _write(kind, choice, image, 2)


def _write(kind: Kind, choice: random.Random, image: Path, times: int) -> None:
    with tapfs.open(image, writable=True, password=PASSWORD if kind.encrypted else None) as disk:
        for _ in range(times):
            length = choice.choice([700, 9000, 2 * kind.cluster + 100])
            disk.write(choice.randrange(kind.size - length), choice.randbytes(length))
        disk.write(kind.size - 600, choice.randbytes(600))
        disk.flush()


def _add_zeros(data: bytearray) -> None:
    """Have one cluster with a place read as zeros, and one without, where the image can say so."""
    anatomy = Anatomy(data)
    if anatomy.version == 2:
        return
    for entry in (anatomy.entries("data")[1:2], anatomy.entries("empty")[:1]):
        for at in entry:
            if anatomy.extended:
                anatomy.put(at + 8, SUBCLUSTERS << 32)
            else:
                anatomy.put(at, anatomy.number(at) | ZERO)
