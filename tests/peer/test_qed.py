"""QED images that qemu-img and qemu-io write, with parents and zero clusters, and images that both read."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import tapfs
from tests.peer.test_convert import qemu
from tests.unit.formats.qed.test_qed import Qed

MIB = 1 << 20

pytestmark = pytest.mark.usefixtures("each_qemu")


def by_tapfs(path: Path) -> bytes:
    with tapfs.open(path) as disk:
        return disk.read(0, disk.size)


def by_qemu(path: Path) -> bytes:
    raw = path.with_suffix(".by-qemu")
    qemu("qemu-img", "convert", "-f", "qed", "-O", "raw", path, raw)
    return raw.read_bytes()


@pytest.mark.parametrize("options", ["cluster_size=4096,table_size=2", "cluster_size=65536", "cluster_size=1M"])
@pytest.mark.parametrize("over", [False, True])
def test_what_qemu_writes(tmp_path: Path, options: str, *, over: bool) -> None:
    image, base, choice = tmp_path / "a.qed", tmp_path / "base.raw", random.Random(1)
    size = 9 * MIB + 512
    base.write_bytes(choice.randbytes(7 * MIB + 100 * 512))
    backing = ["-b", "base.raw", "-F", "raw"] if over else []
    qemu("qemu-img", "create", "-f", "qed", "-o", options, *backing, image, size)
    expected = bytearray(base.read_bytes().ljust(size, b"\0") if over else size)
    commands: list[str] = []
    for pattern in range(1, 60):
        length = 512 * choice.choice((1, 7, 8, 200))
        offset = 512 * choice.randrange((size - length) // 512)
        if pattern % 6 == 0:
            commands += ["-c", f"write -z {offset} {length}"]
            expected[offset : offset + length] = bytes(length)
        else:
            commands += ["-c", f"write -P {pattern} {offset} {length}"]
            expected[offset : offset + length] = bytes([pattern]) * length
    qemu("qemu-io", "-f", "qed", *commands, image)
    assert by_tapfs(image) == expected == by_qemu(image)
    report = tapfs.check(image)
    assert (report.corruptions, report.leaks) == (0, 0), report.findings


def test_qemu_reads_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a.qed"
    path.write_bytes(Qed().content())
    assert by_tapfs(path) == Qed().disk() == by_qemu(path)


def test_qemu_refuses_tables_of_one_cluster(tmp_path: Path) -> None:
    """The specification allows them, and qemu-img makes them; only it cannot open what it made."""
    path = tmp_path / "a.qed"
    qemu("qemu-img", "create", "-f", "qed", "-o", "cluster_size=4096,table_size=1", path, MIB)
    qemu("qemu-img", "check", "-f", "qed", path, code=1)
    assert not any(by_tapfs(path))
    image = Qed(table_clusters=1, size=600 * 4096, clusters=((0, "data"), (511, "zero")))
    path.write_bytes(image.content())
    assert by_tapfs(path) == image.disk()
