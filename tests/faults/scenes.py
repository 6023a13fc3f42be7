"""Images of every kind that the engine treats in a way of its own, filled at random, with the bytes of their disks."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tapfs
from tapfs.jobs.create import NewImage

#: "-direct" is O_DIRECT; "blktap" is its live fast path, which allocates as blktap did.
KINDS = (
    "raw",
    "qcow",
    "overlay",
    "aes",
    "aes-overlay",
    "blktap",
    "blktap-overlay",
    "compressed",
    "raw-direct",
    "qcow-direct",
    "overlay-direct",
    "aes-direct",
    "aes-overlay-direct",
    "blktap-direct",
    "blktap-overlay-direct",
    "vhd",
    "vhd-fixed",
    "vhd-overlay",
    "vhd-direct",
    "vhd-overlay-direct",
    "vhdx",
    "vhdx-fixed",
    "vhdx-overlay",
    "vhdx-direct",
    "vhdx-overlay-direct",
    "vdi",
    "vdi-fixed",
    "vdi-overlay",
    "vdi-direct",
    "vdi-overlay-direct",
    "qcow2",
    "qcow2-overlay",
    "qcow2-compressed",
    "qcow2-subclusters",
    "qcow2-subclusters-overlay",
    "qcow2-direct",
    "qcow2-overlay-direct",
    "vmdk",
    "vmdk-zeroed",
    "vmdk-overlay",
    "vmdk-direct",
    "vmdk-overlay-direct",
)

#: No byte of a disk is larger, so poisoned memory is never taken for contents.
LARGEST_BYTE = 100

SECTOR = 512

_PASSWORD = b"secret"


@dataclass
class Scene:
    """An image in a folder of its own, how it is opened, and what its disk holds."""

    kind: str
    path: Path
    content: bytearray
    options: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def checked(self) -> bool:
        """Whether the format has metadata that can be checked."""
        return self.options["format"] != "raw"

    def opened(self, path: Path | None = None, **options: Any) -> tapfs.Image:
        """The image, or a copy of it, opened as its kind says."""
        return tapfs.open(path or self.path, **(self.options | options))


def read(disk: tapfs.Image, offset: int, length: int) -> bytes:
    """What a disk holds, into memory that was full of something else, so that all of it must be filled."""
    buffer = bytearray(b"\xee") * length
    disk.read_into(offset, buffer)
    return bytes(buffer)


def some_bytes(choice: random.Random, length: int) -> bytes:
    """Zeros, one byte again and again, or noise."""
    what = choice.random()
    if what < 0.2:
        return bytes(length)
    if what < 0.6:
        return bytes([choice.randrange(1, LARGEST_BYTE + 1)]) * length
    return bytes(1 + byte % LARGEST_BYTE for byte in choice.randbytes(length))


def make(kind: str, choice: random.Random, folder: Path, *, size: int | None = None) -> Scene:
    """A new image of a kind; without a size one is drawn, odd ones too."""
    direct = kind.endswith("-direct")
    base = kind.removesuffix("-direct")
    if size is None:
        size = choice.choice([1 << 20, (1 << 20) + 512, 3 << 20])
        if base == "raw":
            size += choice.choice([0, 1, 513, 4095])
    path = folder / "disk"
    content = bytearray(size)
    format_name = next(
        (name for name in ("raw", "qcow2", "vhdx", "vhd", "vdi", "vmdk") if base.startswith(name)), "qcow"
    )
    options: dict[str, Any] = {"format": format_name, "writable": True, "direct": direct}
    if base == "raw":
        with path.open("wb") as file:
            file.truncate(size)
        return Scene(kind, path, content, options)
    creation: dict[str, str] = {}
    if base.startswith("blktap"):
        creation["blktap"] = "on"
    elif base == "vhd-fixed":
        creation["subformat"] = "fixed"
    elif format_name == "vhdx":
        creation["block_size"] = "1M"
        if base == "vhdx-fixed":
            creation["subformat"] = "fixed"
    elif format_name == "vdi":
        creation["static"] = "on" if base == "vdi-fixed" else "off"
    elif format_name == "vhd":
        creation["block_size"] = choice.choice(["4096", "65536", "2097152"])
    elif format_name == "vmdk":
        creation["zeroed_grain"] = "on" if base == "vmdk-zeroed" else choice.choice(["on", "off"])
    elif format_name == "qcow2":
        creation |= _qcow2_options(base, choice)
    elif choice.random() < 0.7:
        creation["cluster_size"] = choice.choice(["512", "2048", "4096", "65536"])
    backing, parent_format = None, "raw"
    if base.endswith("overlay"):
        backing = folder / "parent"
        # The parent of a VHDX image, of a VDI or of a VMDK, is one, too, and a whole number of sectors.
        parent_format = format_name if format_name in {"vhdx", "vdi", "vmdk"} else "raw"
        options["backing_formats"] = [parent_format]
        length = size - choice.choice([0, 0, 40960] if parent_format != "raw" else [0, 0, 700, 40000])
        _fill(content, choice, length)
        source = folder / "parent.raw"
        source.write_bytes(content[:length])
        tapfs.convert(source, backing, format="raw", target_format=parent_format)
    if base.startswith("aes"):
        options["password"] = _PASSWORD
    if base.endswith("compressed"):
        _fill(content, choice, size)
        source = folder / "source"
        source.write_bytes(content)
        with tapfs.open(source, format="raw") as disk:
            _compress(disk, path, format_name, creation)
    else:
        tapfs.create(
            str(path),
            format_name,
            size,
            backing=None if backing is None else str(backing),
            backing_format=None if backing is None else parent_format,
            options=creation,
            password=options.get("password"),
        )
    return Scene(kind, path, content, options)


def _qcow2_options(base: str, choice: random.Random) -> dict[str, str]:
    if "subclusters" in base:
        return {"extended_l2": "on", "cluster_size": choice.choice(["16384", "65536"])}
    return {
        "cluster_size": choice.choice(["512", "4096", "65536"]),
        "refcount_bits": choice.choice(["1", "8", "16", "64"]),
    }


def _compress(disk: tapfs.Image, path: Path, format_name: str, creation: dict[str, str]) -> None:
    from tapfs.jobs.convert import convert_to_new

    convert_to_new(disk, str(path), NewImage(format_name, disk.size, options=creation), compressed=True)


def _fill(content: bytearray, choice: random.Random, end: int) -> None:
    for _ in range(20):
        offset = choice.randrange(end)
        piece = some_bytes(choice, min(choice.randrange(1, 60000), end - offset))
        content[offset : offset + len(piece)] = piece
