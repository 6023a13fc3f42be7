"""Interoperation with QEMU, both ways, on real files."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

from tapfs.driver import OpenRequest, Operation
from tapfs.extent import Kind
from tapfs.formats.qcow import FORMAT
from tapfs.testing.model import MemoryFile, read_extents
from tests.qcow_images import created, fill_compressed, make, opened, write_to

MIB = 1 << 20


def qemu_io(image: Path, *commands: str) -> None:
    words = [word for command in commands for word in ("-c", command)]
    subprocess.run(["qemu-io", "-f", "qcow", *words, image], check=True, stdout=subprocess.DEVNULL)


def by_qemu(image: Path) -> bytes:
    raw = image.with_suffix(".raw")
    subprocess.run(["qemu-img", "convert", "-f", "qcow", "-O", "raw", image, raw], check=True)
    return raw.read_bytes()


def by_tapfs(image: Path, backing: bytes = b"") -> bytes:
    file = MemoryFile(image.read_bytes(), str(image))
    driver = FORMAT.open(file, OpenRequest())
    report = driver.check()
    assert (report.corruptions, report.leaks) == (0, 0), report.findings
    return read_extents(driver, file, 0, driver.geometry.virtual_size, backing)


def writes(seed: int, size: int) -> list[str]:
    choice = random.Random(seed)
    commands: list[str] = []
    for number in range(30):
        offset = choice.randrange(size // 512) * 512
        length = min(choice.choice([512, 4096, 70_000 // 512 * 512]), size - offset)
        commands.append(f"write -P {number + 1} {offset} {length}")
    return sorted(commands, reverse=bool(seed % 2))


@pytest.mark.parametrize("seed", range(4))
def test_what_qemu_writes_is_read(seed: int, tmp_path: Path) -> None:
    image = tmp_path / "image.qcow"
    words: list[str | Path] = []
    backing = b""
    if seed > 1:
        backing = random.Random(seed).randbytes(3 * MIB)
        (tmp_path / "base").write_bytes(backing)
        words = ["-b", tmp_path / "base", "-F", "raw"]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow", *words, image, "7M"], check=True)
    qemu_io(image, *writes(seed, 7 * MIB))
    assert by_tapfs(image, backing) == by_qemu(image)


def test_what_qemu_compresses_is_read(sample: Path, tmp_path: Path) -> None:
    image = tmp_path / "image.qcow"
    # qemu-img 7.2.22 ends with status 1 and no message after every `convert -c -O qcow`, of zeros too, though
    # the image is whole (why is not known). So not its status but its own comparison says whether it is.
    subprocess.run(["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow", sample, image], check=False)
    subprocess.run(["qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow", sample, image], check=True)
    file = MemoryFile(image.read_bytes())
    kinds = {extent.kind for extent in FORMAT.open(file, OpenRequest()).map(0, 3 * MIB)}
    assert kinds == {Kind.DATA, Kind.COMPRESSED, Kind.UNALLOCATED}
    assert by_tapfs(image) == sample.read_bytes()


@pytest.mark.parametrize("kind", ["qemu", "qemu-compressed", "blktap", "blktap-reserve", "blktap-stray"])
def test_what_the_driver_writes_qemu_reads(kind: str, tmp_path: Path) -> None:
    file, _ = make(kind, 5 * MIB + 512, 3)
    disk = opened(file)
    choice = random.Random(kind)
    for _ in range(20):
        offset = choice.randrange(5 * MIB)
        disk.write(offset, choice.randbytes(min(50_000, 5 * MIB + 512 - offset)))
    disk.zero(0, 256 * 1024, Operation.ZERO)
    disk.zero(3 * MIB, 256 * 1024, Operation.DISCARD)
    disk.write(3 * MIB + 100, b"after")
    disk.flush()
    assert by_qemu(write_to(file, tmp_path / "image.qcow")) == disk.whole()


def test_what_the_driver_writes_into_an_overlay_qemu_reads(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.write_bytes(random.Random(1).randbytes(2 * MIB + 512))
    disk = opened(created(5 * MIB, backing=str(base)), base.read_bytes())
    disk.write(MIB + 300, b"x" * 5000)
    disk.write(2 * MIB - 10_000, b"y" * 20_000)
    disk.zero(512 * 1024, 64 * 1024)
    disk.flush()
    image = write_to(disk.file, tmp_path / "image.qcow")
    raw = tmp_path / "guest.raw"
    node = f'json:{{"driver":"qcow","file.filename":"{image}","backing":{{"driver":"raw","file.filename":"{base}"}}}}'
    subprocess.run(["qemu-img", "convert", "-O", "raw", node, raw], check=True)
    assert raw.read_bytes() == disk.whole()


def test_driver_and_qemu_take_turns(tmp_path: Path) -> None:
    image = tmp_path / "image.qcow"
    file = created(8 * MIB)
    expected = bytearray(8 * MIB)
    for turn in range(6):
        choice = random.Random(turn)
        disk = opened(file)
        for _ in range(5):
            offset = choice.randrange(8 * MIB - 30_000)
            data = choice.randbytes(30_000)
            disk.write(offset, data)
            expected[offset : offset + 30_000] = data
        disk.zero(turn * MIB, 128 * 1024, Operation.DISCARD)
        expected[turn * MIB : turn * MIB + 128 * 1024] = bytes(128 * 1024)
        disk.flush()
        write_to(file, image)
        offset = choice.randrange(8 * MIB // 512 - 100) * 512
        qemu_io(image, f"write -P {turn + 1} {offset} 51200")
        expected[offset : offset + 51200] = bytes([turn + 1]) * 51200
        file = MemoryFile(image.read_bytes())
        assert by_tapfs(image) == expected
    assert by_qemu(image) == expected


def test_qemu_writes_into_a_blktap_image_and_the_fast_path_is_off(tmp_path: Path) -> None:
    file, _ = make("blktap", 9 * MIB, 0)
    image = write_to(file, tmp_path / "image.qcow")
    before = FORMAT.open(file, OpenRequest())
    free = next(index for index in range(4) if before.map(index * 2 * MIB, 1)[0].kind is Kind.UNALLOCATED)
    qemu_io(image, f"write -P 7 {free * 2 * MIB + 8192} 4096")
    file = MemoryFile(image.read_bytes())
    assert not FORMAT.open(file, OpenRequest()).fast_path
    assert by_tapfs(image) == by_qemu(image)
    # The cksum is right after a repair, but L1 does not give every cluster any more.
    file.apply_all(list(FORMAT.open(file, OpenRequest(lenient=True)).repair()))
    repaired = FORMAT.open(file, OpenRequest())
    assert repaired.cksum_valid
    assert not repaired.fast_path
    write_to(file, image)
    assert by_tapfs(image) == by_qemu(image)


@pytest.mark.parametrize("options", [{}, {"blktap": "on"}, {"cluster_size": "65536"}, {"cluster_size": "512"}])
def test_a_stream_is_read_by_qemu(options: dict[str, str], tmp_path: Path) -> None:
    file = created(5 * MIB, options)
    disk = opened(file)
    fill_compressed(disk, random.Random(4))
    image = write_to(file, tmp_path / "image.qcow")
    assert by_tapfs(image) == by_qemu(image)
    assert any(extent.kind is Kind.COMPRESSED for extent in disk.driver.map(0, 5 * MIB))


def test_a_disk_that_is_no_whole_number_of_sectors_is_whole() -> None:
    disk = opened(created(MIB + 300))
    assert disk.driver.geometry.virtual_size == MIB + 512
    disk.file.data[24:32] = (MIB + 300).to_bytes(8, "big")
    disk = opened(MemoryFile(bytes(disk.file.data)))
    disk.write(MIB, b"z" * 300)
    disk.flush()
    again = FORMAT.open(disk.file, OpenRequest())
    assert read_extents(again, disk.file, MIB, 300) == b"z" * 300
    assert any("multiple of 512" in finding.message for finding in again.check().findings)
