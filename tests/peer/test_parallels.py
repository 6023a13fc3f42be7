"""Parallels images that qemu-img writes, and images of both kinds that both programs read."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import tapfs
from tests.peer.test_convert import qemu
from tests.unit.formats.parallels.test_parallels import IMAGES, Parallels

MIB = 1 << 20

pytestmark = pytest.mark.usefixtures("each_qemu")


def by_tapfs(path: Path) -> bytes:
    with tapfs.open(path) as disk:
        return disk.read(0, disk.size)


def by_qemu(path: Path) -> bytes:
    raw = path.with_suffix(".raw")
    qemu("qemu-img", "convert", "-f", "parallels", "-O", "raw", path, raw)
    return raw.read_bytes()


@pytest.mark.parametrize("cluster_size", [65536, MIB])
def test_what_qemu_writes(tmp_path: Path, cluster_size: int) -> None:
    image, choice = tmp_path / "a.hds", random.Random(1)
    qemu("qemu-img", "create", "-f", "parallels", "-o", f"cluster_size={cluster_size}", image, 9 * MIB + 512)
    expected = bytearray(9 * MIB + 512)
    commands: list[str] = []
    for pattern in range(1, 60):
        length = 512 * choice.choice((1, 7, 8, 200))
        offset = 512 * choice.randrange((len(expected) - length) // 512)
        commands += ["-c", f"write -P {pattern} {offset} {length}"]
        expected[offset : offset + length] = bytes([pattern]) * length
    qemu("qemu-io", "-f", "parallels", *commands, image)
    assert by_tapfs(image) == expected == by_qemu(image)
    report = tapfs.check(image)
    assert (report.corruptions, report.leaks) == (0, 0)


@pytest.mark.parametrize("name", [name for name in IMAGES if name != "in use"])
def test_qemu_reads_the_same(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.hds"
    path.write_bytes(IMAGES[name].content())
    assert by_qemu(path) == by_tapfs(path)


def test_qemu_ignores_that_an_image_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "a.hds"
    path.write_bytes(Parallels(flags=1).content())
    assert by_qemu(path) == by_tapfs(path) == Parallels().disk()


def test_qemu_reads_zeros_past_the_end_of_the_file(tmp_path: Path) -> None:
    content = bytearray(Parallels().content())
    content[64:68] = (100).to_bytes(4, "little")
    path = tmp_path / "a.hds"
    path.write_bytes(content)
    assert by_qemu(path) == Parallels().disk()
    with pytest.raises(tapfs.ImageError, match="past the end of the file"):
        by_tapfs(path)
