"""Kinds of images that the formats of tapfs make by their options, as the kit of drivers takes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from tapfs.disk.probe import format_named, own_format_names
from tapfs.driver import Ability, CreatableFormat, DescribedFormat


class MadeKind(NamedTuple):
    """Images of a format with options of `create`, over a parent or not."""

    format: str
    options: Mapping[str, str]
    overlay: bool

    def __str__(self) -> str:
        options = " ".join(f"{name}={value}" for name, value in self.options.items())
        return " ".join(filter(None, (self.format, options, "over a parent" if self.overlay else "")))


#: Kinds of images beside those that a format makes without options, each over a parent or not.
KINDS: list[MadeKind] = [
    MadeKind("qcow", {"cluster_size": "512"}, overlay=True),
    MadeKind("qcow", {"blktap": "on"}, overlay=False),
    MadeKind("qcow", {"blktap": "on"}, overlay=True),
    MadeKind("qcow2", {"encrypt.iter-time": "1"}, overlay=False),
]


#: Options without which a new image takes seconds, for its password to take seconds, too.
QUICK = {"luks": {"iter-time": "1"}}


def kinds() -> Iterator[MadeKind]:
    """One row for every format of tapfs that makes images to be written, and one over a parent if it has parents."""
    for name in own_format_names():
        found = format_named(name)
        if isinstance(found, CreatableFormat) and isinstance(found, DescribedFormat):
            if Ability.WRITE in found.abilities:
                yield MadeKind(name, QUICK.get(name, {}), overlay=False)
            if {Ability.WRITE, Ability.BACKING} <= found.abilities:
                yield MadeKind(name, {}, overlay=True)
    yield from KINDS


#: Kinds that another size meets otherwise.
RESIZED: list[MadeKind] = [
    MadeKind("qcow2", {"cluster_size": "512"}, overlay=True),
    MadeKind("qcow2", {"compat": "0.10", "cluster_size": "4096"}, overlay=True),
    MadeKind("qcow2", {"extended_l2": "on", "cluster_size": "16384"}, overlay=True),
    MadeKind("qcow2", {"refcount_bits": "1", "cluster_size": "512"}, overlay=False),
    MadeKind("qcow2", {"data_file": "outside", "cluster_size": "4096"}, overlay=True),
    MadeKind("qcow2", {"data_file": "outside", "data_file_raw": "on"}, overlay=False),
    MadeKind("qcow", {"cluster_size": "512"}, overlay=True),
    MadeKind("qcow", {"blktap": "on"}, overlay=False),
    MadeKind("qcow", {"blktap": "on"}, overlay=True),
    MadeKind("vdi", {"static": "on"}, overlay=False),
    MadeKind("vmdk", {"subformat": "monolithicFlat"}, overlay=False),
    MadeKind("vmdk", {"subformat": "twoGbMaxExtentSparse"}, overlay=True),
    MadeKind("vmdk", {"subformat": "vmfsSparse"}, overlay=True),
    MadeKind("vmdk", {"zeroed_grain": "on"}, overlay=True),
    MadeKind("vhd", {"subformat": "fixed"}, overlay=False),
    MadeKind("vhdx", {"subformat": "fixed", "block_size": "1048576"}, overlay=False),
    MadeKind("vhdx", {"logical_sector_size": "4096"}, overlay=False),
    MadeKind("vhdx", {"block_size": "1048576"}, overlay=False),
    MadeKind("vhdx", {"block_size": "1048576"}, overlay=True),
    MadeKind("vhd", {"block_size": "4096"}, overlay=False),
    MadeKind("vhd", {"block_size": "4096"}, overlay=True),
]


def resizable_kinds() -> Iterator[MadeKind]:
    """The rows of the formats that can be resized, and more kinds of them."""
    for kind in kinds():
        found = format_named(kind.format)
        if isinstance(found, DescribedFormat) and Ability.RESIZE in found.abilities:
            yield kind
    yield from RESIZED
