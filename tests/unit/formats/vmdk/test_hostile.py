"""Damaged VMDKs of the kinds that `create` does not make: an ImageError, or answers that keep to the contract."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from tapfs.formats.vmdk import FORMAT
from tapfs.testing import hostile
from tapfs.testing.model import MemoryFile
from tapfs.testing.subject import Subject
from tests.vmdk_disks import KINDS, make
from tests.vmdk_images import descriptor, random_grains, sectors, sesparse, stream

MIB = 1 << 20
IMAGES = 60


def streamed(choice: random.Random, **keys: bool) -> MemoryFile:
    size = 40 * 8192 + 512
    return MemoryFile(stream(random_grains(choice, size, 8192), size, grain_sectors=16, **keys))


def space_efficient(choice: random.Random) -> MemoryFile:
    size = 2 * MIB
    extent = sesparse(random_grains(choice, size, 4096, zeros=True), size)
    text = descriptor([f'RW {sectors(size)} SESPARSE "e"'])
    return MemoryFile(text, "disk.vmdk", {"e": MemoryFile(extent, "e")})


def listed(choice: random.Random) -> MemoryFile:
    """A list with everything that a line can be."""
    lines = ['RW 8 FLAT "f" 1', "RW 8 ZERO", 'NOACCESS 8 FLAT "n"', 'RDONLY 8 VMFS "f"', "RW 0 ZERO"]
    return MemoryFile(descriptor(lines), "disk.vmdk", {"f": MemoryFile(choice.randbytes(9 * 512), "f")})


BUILT: dict[str, Callable[[random.Random], MemoryFile]] = {
    "stream": streamed,
    "stream with the directory in front": lambda choice: streamed(choice, footer=False),
    "stream without markers": lambda choice: streamed(choice, footer=False, markers=False),
    "seSparse": space_efficient,
    "list": listed,
    **{kind: lambda choice, kind=kind: make(kind, 300_032, choice.randrange(9))[0] for kind in KINDS},  # type: ignore[misc]
}


@pytest.mark.parametrize("kind", BUILT)
def test_damaged_images(kind: str) -> None:
    choice = random.Random(kind)
    subject = Subject(FORMAT)
    for _ in range(IMAGES):
        image = BUILT[kind](choice)
        for _ in range(choice.choice([1, 1, 2, 4, 10])):
            hostile.damage(image.numbered(choice.randrange(1 + len(image.further))).data, choice)
        hostile.use(subject, image, choice)
