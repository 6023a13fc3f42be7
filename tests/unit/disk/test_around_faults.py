"""One entry of a table that cannot be true costs what it maps, and nothing else of its map unit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import tapfs as api
from tapfs.errors import ErrorKind, ImageError

Run = Callable[..., Any]
MIB = 1 << 20


class Case(NamedTuple):
    """A format, the bytes that an entry maps, how the entry of a host offset is written, and what it is made."""

    name: str
    step: int
    entry: Callable[[int], bytes]
    wrong: bytes
    options: Mapping[str, str] = {}


def big(number: int, width: int = 8) -> bytes:
    return number.to_bytes(width, "big")


def little(number: int, width: int = 4) -> bytes:
    return number.to_bytes(width, "little")


CASES = {
    "qcow2": Case("qcow2", 65536, lambda place: big(place | 1 << 63), big(1 << 63 | 0x123456000)),
    "version 2": Case(
        "qcow2", 512, lambda place: big(place | 1 << 63), big(1 << 63 | 1), {"compat": "v2", "cluster_size": "512"}
    ),
    "subclusters": Case(
        "qcow2", 65536, lambda place: big(place | 1 << 63) + big(0xFFFFFFFF), bytes(8) + big(7), {"extended_l2": "on"}
    ),
    "qcow": Case("qcow", 4096, big, big(1 << 50)),
    "vmdk": Case("vmdk", 65536, lambda place: little(place // 512), little(1 << 30)),
    "vdi": Case("vdi", MIB, lambda place: little((place >> 20) - 2), little(1 << 30)),
    "vhdx": Case("vhdx", MIB, lambda place: little(place | 6, 8), little(1 << 50 | 6, 8), {"block_size": "1M"}),
}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def damaged(path: Path, case: Case) -> tuple[bytearray, int]:
    """An image of seven entries, of which the fourth cannot be true; its disk, and where the bad entry maps."""
    step = case.step
    api.create(path, case.name, 16 * step, options=case.options)
    content = bytearray(16 * step)
    with api.open(path, format=case.name, writable=True) as disk:
        for number in range(7):
            content[number * step : (number + 1) * step] = bytes([number + 1]) * step
        disk.write(0, content[: 7 * step])
        disk.flush()
        (place,) = (
            each.host_offset + 3 * step - each.offset
            for each in disk.layers[0].driver.map(0, disk.size)
            if each.offset <= 3 * step < each.end
        )
    data = path.read_bytes()
    head, tables = data[:512], data[512:]
    assert case.entry(place) in tables
    path.write_bytes(head + tables.replace(case.entry(place), case.wrong))
    return content, 3 * step


def test_only_the_bad_entry_is_an_error(tmp_path: Path, case: Case) -> None:
    path = tmp_path / "a.image"
    content, bad = damaged(path, case)
    with api.open(path, format=case.name) as disk:
        for _ in range(2):  # the second time from the engine's cache
            assert disk.read(0, bad) == content[:bad]
            assert disk.read(bad + case.step, disk.size - bad - case.step) == content[bad + case.step :]
            for at, length in ((bad, 1), (bad + case.step - 1, 1), (bad - 1, 2), (0, disk.size)):
                with pytest.raises(ImageError) as caught:
                    disk.read(at, length)
                assert (caught.value.kind, caught.value.path) == (ErrorKind.CORRUPT, str(path))
                assert caught.value.offset


@pytest.mark.parametrize("name", ["qcow2", "version 2", "qcow"])
def test_salvage_loses_what_the_bad_entry_maps(tapfs: Run, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    path, target = tmp_path / "a.image", tmp_path / "b.raw"
    content, bad = damaged(path, case)
    ran = tapfs("convert", "--salvage", "-f", case.name, path, target)
    assert ran.code == 1
    assert f"{case.step} bytes could not be read" in ran.err
    content[bad : bad + case.step] = bytes(case.step)
    assert target.read_bytes() == content


def test_writes_beside_the_bad_entry_are_kept(tmp_path: Path) -> None:
    path, case = tmp_path / "a.image", CASES["qcow2"]
    content, bad = damaged(path, case)
    with api.open(path, writable=True) as disk:
        disk.write(bad - 5, b"12345")  # in place
        disk.write(9 * case.step + 7, b"fresh")
        content[bad - 5 : bad] = b"12345"
        content[9 * case.step + 7 : 9 * case.step + 12] = b"fresh"
        for _ in range(2):
            assert disk.read(0, bad) == content[:bad]
            assert disk.read(bad + case.step, disk.size - bad - case.step) == content[bad + case.step :]
            for refused in (lambda: disk.write(bad + 1, b"x"), lambda: disk.read(bad, 1)):
                with pytest.raises(ImageError, match="L2 entry 3 of table 0"):
                    refused()
            disk.flush()
    with api.open(path) as disk:
        assert disk.read(bad + case.step, disk.size - bad - case.step) == content[bad + case.step :]
