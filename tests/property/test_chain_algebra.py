"""Commits and rebases of random chains of mixed formats: whatever is done, the disk of the top image stays the same."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import tapfs
from tapfs.disk.chain import OpenOptions
from tapfs.disk.probe import format_named
from tapfs.driver import Ability, DescribedFormat
from tapfs.jobs.commit import commit_image
from tapfs.jobs.rebase import rebase_image

#: Formats that may be over any parent, with options of create.
ANYWHERE: list[tuple[str, dict[str, str]]] = [
    ("qcow", {}),
    ("qcow", {"cluster_size": "4096"}),
    ("qcow2", {}),
    ("qcow2", {"cluster_size": "512"}),
    ("qcow2", {"compat": "0.10"}),
    ("qcow2", {"extended_l2": "on", "cluster_size": "16384"}),
]
#: Formats that may be over one of their own.
OF_THEIR_OWN: list[tuple[str, dict[str, str]]] = [
    ("vmdk", {}),
    ("vmdk", {"zeroed_grain": "on"}),
    ("vhd", {"block_size": "65536"}),
    ("vhdx", {"block_size": "1M"}),
    ("vdi", {}),
]
BASES: list[tuple[str, dict[str, str]]] = [("raw", {}), *ANYWHERE, *OF_THEIR_OWN]
SEEDS = range(24)


class RandomChain:
    """Images over one another, base first, and what the disk of the last one reads as."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.choice = random.Random(seed)
        self.names: list[str] = []
        self.formats: list[str] = []
        self.disk = bytearray()
        for _ in range(self.choice.randrange(2, 5)):
            self.grow()

    @property
    def top(self) -> str:
        return str(self.folder / self.names[-1])

    @property
    def options(self) -> OpenOptions:
        # Overlays that a rebase has left behind lie over the same bases, and a commit spoils them.
        return OpenOptions(format=self.formats[-1], backing_formats=self.formats[-2::-1], write_base=True)

    def new(self, kinds: list[tuple[str, dict[str, str]]], over: int | None) -> tuple[str, str, int]:
        """An image of one of the kinds over that of the chain with the number, and random bytes in it."""
        choice = self.choice
        name, options = choice.choice(kinds)
        file = f"{len(list(self.folder.iterdir()))}.{name}"
        size = choice.randrange(3, 9) * 512 * 1024 // 1024 * 512 + choice.choice([0, 512, 5 * 512])
        backing = None if over is None else self.names[over]
        parent_format = None if over is None else self.formats[over]
        tapfs.create(self.folder / file, name, size, backing=backing, backing_format=parent_format, options=options)
        return file, name, size

    def grow(self) -> None:
        """One more image on top, written to."""
        own = [kind for kind in OF_THEIR_OWN if self.formats and kind[0] == self.formats[-1]]
        kinds = BASES if not self.formats else own or ANYWHERE
        if own and self.choice.random() < 0.3:
            kinds = ANYWHERE
        file, name, size = self.new(kinds, len(self.names) - 1 if self.names else None)
        self.names.append(file)
        self.formats.append(name)
        self.disk = bytearray(bytes(self.disk[:size]).ljust(size, b"\0"))
        self.write(12)

    def write(self, count: int) -> None:
        """Random bytes and zeros on the top disk."""
        choice = self.choice
        with tapfs.open(self.top, format=self.formats[-1], backing_formats=self.formats[-2::-1], writable=True) as disk:
            assert disk.size >= len(self.disk)
            self.disk.extend(bytes(disk.size - len(self.disk)))
            for _ in range(count):
                offset = choice.randrange(disk.size)
                length = min(choice.choice([1, 512, 700, 4096, 65536, 200_000]), disk.size - offset)
                data = choice.randbytes(length) if choice.random() < 0.6 else bytes(length)
                if any(data):
                    disk.write(offset, data)
                else:
                    disk.write_zeroes(offset, length)
                self.disk[offset : offset + length] = data

    def check(self) -> None:
        with tapfs.open(self.top, format=self.formats[-1], backing_formats=self.formats[-2::-1]) as disk:
            assert disk.read(0, disk.size) == bytes(self.disk)
        for file, name in zip(self.names, self.formats, strict=True):
            described = format_named(name)
            if isinstance(described, DescribedFormat) and Ability.CHECK in described.abilities:
                report = tapfs.check(self.folder / file, format=name)
                assert not report.corruptions, (file, report.findings)

    def commit(self) -> None:
        """Into the parent, or further down; afterwards the images between the two are not what they were."""
        depth = self.choice.randrange(1, len(self.names))
        base = len(self.names) - 1 - depth
        keep = self.formats[-1] == "vdi" or self.choice.random() < 0.3
        if self.formats[base] not in {"raw", "qcow", "qcow2"} and self.size_of(base) < len(self.disk):
            return
        if self.size_of(base) < len(self.disk):
            return
        named = str(self.folder / self.names[base]) if depth > 1 else None
        done = commit_image(self.top, self.options, base=named, keep=keep)
        assert done.emptied == (named is None and not keep)
        assert len(done.invalid) == depth - 1

    def size_of(self, number: int) -> int:
        with tapfs.open(
            self.folder / self.names[number],
            format=self.formats[number],
            metadata_only=True,
            shared=True,
            backing_formats=self.formats[number - 1 :: -1] if number else [],
        ) as disk:
            return disk.size

    def rebase(self) -> None:
        """Over another image of the chain, over a new one, or over none."""
        name = self.formats[-1]
        kinds = [kind for kind in BASES if name in {"qcow", "qcow2"} or kind[0] == name]
        below: list[tuple[str, str]] = []
        what = self.choice.random()
        if what < 0.4 and len(self.names) > 2:
            new = self.choice.randrange(len(self.names) - 1)
            if self.formats[new] not in {kind[0] for kind in kinds}:
                return
            below = list(zip(self.names, self.formats, strict=True))[: new + 1]
        elif what < 0.8 or name in {"vhd", "vhdx"}:
            file, found, _ = self.new(kinds, None)
            with tapfs.open(self.folder / file, format=found, writable=True) as disk:
                for _ in range(6):
                    offset = self.choice.randrange(disk.size - 70000)
                    disk.write(offset, self.choice.randbytes(self.choice.choice([700, 65536])))
            below = [(file, found)]
        backing = below[-1][0] if below else None
        rebase_image(self.top, self.options, backing, backing_formats=[each[1] for each in reversed(below)])
        top = self.names[-1], self.formats[-1]
        self.names, self.formats = ([each[part] for each in [*below, top]] for part in (0, 1))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_disk_stays_the_same(tmp_path: Path, seed: int) -> None:
    chain = RandomChain(tmp_path, seed)
    chain.check()
    for _ in range(6):
        what = chain.choice.random()
        if what < 0.35 and len(chain.names) > 1:
            chain.commit()
        elif what < 0.75:
            chain.rebase()
        elif what < 0.85 and len(chain.names) < 6:
            chain.grow()
        else:
            chain.write(4)
        chain.check()
