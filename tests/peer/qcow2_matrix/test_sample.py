"""A sample of the matrix that `make torture` runs: each kind once, made by tapfs and by QEMU in turn."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.peer.qcow2_matrix.kinds import Kind
from tests.peer.qcow2_matrix.run import Run

SIZE = (3 << 20) + 512

#: Options of creation, and the format of the image below.
KINDS: dict[str, tuple[str, str | None]] = {
    "v2 512": ("compat=0.10,cluster_size=512", "raw"),
    "v2 4096": ("compat=0.10,cluster_size=4096", None),
    "v2 65536": ("compat=0.10", "qcow2"),
    "v2 2M": ("compat=0.10,cluster_size=2097152", "raw"),
    "v3 512": ("compat=1.1,cluster_size=512", None),
    "v3 4096": ("compat=1.1,cluster_size=4096", "raw"),
    "v3 65536": ("compat=1.1", None),
    "v3 2M": ("compat=1.1,cluster_size=2097152", None),
    "refcounts of 1 bit": ("refcount_bits=1,cluster_size=4096", None),
    "refcounts of 8 bits": ("refcount_bits=8,cluster_size=512", "qcow2"),
    "refcounts of 64 bits": ("refcount_bits=64,cluster_size=1024", "raw"),
    "zstd": ("compression_type=zstd,cluster_size=16384", None),
    "data file": ("data_file=outside", None),
    "data file over a parent": ("data_file=outside,cluster_size=4096", "raw"),
    "raw data file": ("data_file=outside,data_file_raw=on", None),
    "subclusters": ("extended_l2=on", None),
    "subclusters 16K": ("extended_l2=on,cluster_size=16384", "raw"),
    "subclusters 2M": ("extended_l2=on,cluster_size=2097152", "qcow2"),
    "subclusters in a data file": ("extended_l2=on,data_file=outside", "raw"),
    "preallocated subclusters in a data file": ("extended_l2=on,data_file=outside,preallocation=falloc", None),
    "lazy": ("lazy_refcounts=on", None),
    "metadata": ("preallocation=metadata", None),
    "falloc": ("preallocation=falloc,cluster_size=4096", None),
    "LUKS": ("encrypt.format=luks,encrypt.iter-time=1,cluster_size=65536", "raw"),
}


def kind_named(name: str) -> Kind:
    options, parent = KINDS[name]
    return Kind(SIZE, dict(option.split("=") for option in options.split(",")), parent, SIZE * 3 // 4 // 512 * 512)


@pytest.mark.parametrize("name", KINDS)
def test_what_one_writes_is_clean_and_the_same_to_the_other(name: str, tmp_path: Path) -> None:
    made_by_tapfs = list(KINDS).index(name) % 2 == 0
    run = Run(kind_named(name), random.Random(name), tmp_path, None, made_by_tapfs=made_by_tapfs)
    run.change(run.qemu if made_by_tapfs else run.tapfs, 25)
    run.change(run.tapfs, 25)
    run.edit()
