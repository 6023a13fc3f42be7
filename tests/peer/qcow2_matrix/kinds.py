"""Kinds of qcow2 images for the matrix: options of creation that go together, drawn at random or by a name."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

KIB = 1 << 10


@dataclass(frozen=True)
class Kind:
    """How an image is made. `parent` is the format of the image below, if there is one, `parent_size` its disk."""

    size: int
    options: Mapping[str, str] = field(default_factory=dict[str, str])
    parent: str | None = None
    parent_size: int = 0
    packed: bool = False

    @property
    def cluster(self) -> int:
        """Bytes of a cluster."""
        return int(self.options.get("cluster_size", "65536"))

    @property
    def version_2(self) -> bool:
        return self.options.get("compat") == "0.10"

    @property
    def encrypted(self) -> bool:
        return "encrypt.format" in self.options

    @property
    def outside(self) -> bool:
        """Whether guest data lies in a file of its own."""
        return "data_file" in self.options

    @property
    def can_pack(self) -> bool:
        """Whether clusters may be compressed."""
        return not self.outside and not self.encrypted

    @property
    def can_keep_snapshots(self) -> bool:
        """Whether refcounts are wide enough: many payloads may share a cluster, and each counts."""
        return not self.outside and int(self.options.get("refcount_bits", "16")) > 4

    def __str__(self) -> str:
        words = [f"{name}={value}" for name, value in self.options.items()]
        words += [f"over {self.parent} of {self.parent_size}"] if self.parent else []
        return f"{self.size} bytes: {', '.join(words) or 'no options'}{', packed' if self.packed else ''}"


def drawn(choice: random.Random) -> Kind:
    """A kind at random."""
    size = choice.choice([1, 3, 6]) * 1024 * KIB + choice.choice([0, 512, 33 * 512])
    version_2 = choice.random() < 0.2
    options: dict[str, str] = {"compat": "0.10"} if version_2 else {}
    clusters = [512, 1024, 4096, 16 * KIB, 64 * KIB, 64 * KIB, 256 * KIB, 2048 * KIB]
    if not version_2:
        if choice.random() < 0.3:
            options["extended_l2"] = "on"
            clusters = clusters[3:]
        if choice.random() < 0.4:
            options["refcount_bits"] = choice.choice(["1", "2", "4", "8", "32", "64"])
        if choice.random() < 0.25:
            options["compression_type"] = "zstd"
        if choice.random() < 0.2:
            options["lazy_refcounts"] = "on"
    options["cluster_size"] = str(choice.choice(clusters))
    # A LUKS header has about 2 MiB, which clusters of 512 bytes would need many refcount blocks for.
    if choice.random() < 0.12 and int(options["cluster_size"]) >= 4096:
        options |= {"encrypt.format": "luks", "encrypt.iter-time": "1"}
    elif not version_2 and choice.random() < 0.15:
        options["data_file"] = "outside"
        if choice.random() < 0.5:
            options["data_file_raw"] = "on"
    parent = choice.choice([None, None, "raw", "qcow2", "qcow"])
    if options.get("data_file_raw"):
        parent = None
    if parent is None and choice.random() < 0.2:
        full = [] if "encrypt.format" in options else ["full"]  # which tapfs refuses: the disk would be noise
        options["preallocation"] = choice.choice(["metadata", "falloc", *full])
    parent_size = choice.choice([size // 2 // 512 * 512, size, size + 700 * KIB])
    kind = Kind(size, options, parent, parent_size)
    packed = parent is None and kind.can_pack and "preallocation" not in options and choice.random() < 0.3
    return Kind(size, options, parent, parent_size, packed)
