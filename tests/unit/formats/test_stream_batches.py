"""A stream writer that is asked for many places at once gives those that it would give one by one."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import cast

import pytest

from tapfs.driver import BatchStreamWriter, Checkable, OpenRequest, Streamable, StreamWriter, WritableDriver
from tapfs.formats.qcow import FORMAT as QCOW
from tapfs.formats.qcow2 import FORMAT as QCOW2
from tapfs.testing.model import MemoryFile
from tests import qcow2_images, qcow_images

Unit = tuple[int, int]

SIZE = 4 << 20
SMALL = {"cluster_size": "512", "compat": "1.1"}
KINDS: dict[str, Callable[[], MemoryFile]] = {
    "qcow": lambda: qcow_images.created(SIZE),
    "qcow2": lambda: qcow2_images.created(SIZE),
    "qcow2-512": lambda: qcow2_images.created(SIZE, SMALL),
    "qcow2-512-1-bit": lambda: qcow2_images.created(SIZE, {**SMALL, "refcount_bits": "1"}),
    "qcow2-512-2-bits": lambda: qcow2_images.created(SIZE, {**SMALL, "refcount_bits": "2"}),
    "qcow2-512-64-bits": lambda: qcow2_images.created(SIZE, {**SMALL, "refcount_bits": "64"}),
    "qcow2-4096": lambda: qcow2_images.created(SIZE, {"cluster_size": "4096"}),
    "qcow2-extended": lambda: qcow2_images.created(SIZE, {"cluster_size": "16384", "extended_l2": "on"}),
}


def written(
    kind: str, write: Callable[[StreamWriter, int, list[Unit]], list[int]], seed: int
) -> tuple[bytes, list[int]]:
    """The image that a stream of random granules fills in some drains, and the places of all."""
    choice = random.Random(seed)
    file = KINDS[kind]()
    image_format = QCOW if kind == "qcow" else QCOW2
    driver = cast("WritableDriver", image_format.open(file, OpenRequest(writable=True)))
    writer = cast("Streamable", driver).stream()
    granule = driver.geometry.packed_unit
    units: list[Unit] = []
    offset = length = 0
    while offset < SIZE:
        if choice.random() < 0.1:
            length = choice.choice([0, granule // 3, granule - 1, 40])
        units.append((offset, length and choice.randint(1, length)))
        offset += granule * (1 if choice.random() < 0.9 else choice.randint(2, 200))
    places: list[int] = []
    while units:
        part = units[: choice.randint(1, 300)]
        del units[: len(part)]
        places += write(writer, granule, part)
        file.data.extend(bytes(max(0, places[-1] + (part[-1][1] or granule) - len(file.data))))
        if choice.random() < 0.3 or not units:
            made = writer.drain() if units else writer.finish()
            file.apply(made)
            writer.drained(made)
    report = cast("Checkable", image_format.open(MemoryFile(bytes(file.data)), OpenRequest(lenient=True))).check()
    assert (report.corruptions, report.leaks) == (0, 0)
    return bytes(file.data), places


def one_by_one(writer: StreamWriter, granule: int, units: list[Unit]) -> list[int]:
    return [writer.append(offset, length or granule, compressed=length != 0) for offset, length in units]


def at_once(writer: StreamWriter, granule: int, units: list[Unit]) -> list[int]:
    del granule
    assert isinstance(writer, BatchStreamWriter)
    offsets, lengths = [offset for offset, _ in units], [length for _, length in units]
    return list(writer.append_all(offsets, lengths))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_has_the_places_of_its_units(kind: str) -> None:
    for seed in range(2):
        image, places = written(kind, at_once, seed)
        expected_image, expected_places = written(kind, one_by_one, seed)
        assert places == expected_places
        assert image == expected_image
