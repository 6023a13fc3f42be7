"""VMDKs both ways with qemu-img, qemu-io, libvmdk, dissect and 7-Zip.

docs/specs/vmdk.md, "Traps (things peers get wrong)", has what each of them reads wrongly, so not every image goes to
every reader. qemu-img is a process of its own in any case: it aborts on some descriptors.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tapfs as tapfs_package
from tests.peer.test_convert import qemu
from tests.vmdk_images import (
    ZERO,
    cowd,
    hosted,
    monolithic,
    random_grains,
    read_grains,
    sesparse,
    stream,
    write_list,
)

Run = Callable[..., Any]
DONE = (0, "", "")
MIB = 1 << 20

pytestmark = pytest.mark.usefixtures("each_qemu")
GRAIN = 16 * 512
SUBFORMATS = ["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "streamOptimized"]


def by_qemu(path: Path) -> bytes:
    raw = path.with_name("by-qemu.raw")
    qemu("qemu-img", "convert", "-f", "vmdk", "-O", "raw", path, raw)
    return raw.read_bytes()


#: Each leaves its files open, and a damaged image is nothing to show a library in the process of the tests.
_LIBVMDK = """
import sys, pyvmdk
handle = pyvmdk.handle()
handle.open(sys.argv[1])
handle.open_extent_data_files()
sys.stdout.buffer.write(handle.read_buffer(handle.get_media_size()))
"""
_DISSECT = """
import sys
from pathlib import Path
from dissect.hypervisor.disk.vmdk import VMDK
disk = VMDK(Path(sys.argv[1]))
sys.stdout.buffer.write(disk.read(disk.size))
"""


def by_program(program: str, path: Path) -> bytes:
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def by_libvmdk(path: Path) -> bytes:
    return by_program(_LIBVMDK, path)


def by_dissect(path: Path) -> bytes:
    return by_program(_DISSECT, path)


def by_7zip(path: Path) -> bytes:
    done = subprocess.run(["7zz", "e", "-so", "-tvmdk", path], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def by_tapfs(tapfs: Run, tmp_path: Path) -> Callable[[Path], bytes]:
    def read(path: Path) -> bytes:
        target = tmp_path / "by-tapfs.raw"
        assert tapfs("convert", "-O", "raw", path, target) == DONE
        return target.read_bytes()

    return read


READERS = {"qemu": by_qemu, "libvmdk": by_libvmdk, "dissect": by_dissect, "7zip": by_7zip}


def test_a_stream_is_no_larger_than_that_of_qemu(tmp_path: Path, tapfs: Run) -> None:
    raw, ours, theirs = tmp_path / "raw", tmp_path / "ours.vmdk", tmp_path / "theirs.vmdk"
    program = Path(shutil.which("qemu-img") or "").read_bytes()
    raw.write_bytes(program[: len(program) // GRAIN * GRAIN])
    words = ("-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", raw)
    qemu("qemu-img", "convert", *words, theirs)
    assert tapfs("convert", *words, ours) == DONE
    assert ours.stat().st_size <= theirs.stat().st_size


@pytest.mark.parametrize("size", [7 * MIB, 3 * MIB + 100 * 1024])
@pytest.mark.parametrize("subformat", SUBFORMATS)
def test_what_qemu_converts(
    tmp_path: Path, subformat: str, size: int, by_tapfs: Callable[[Path], bytes], tapfs: Run
) -> None:
    raw, image = tmp_path / "raw", tmp_path / "disk.vmdk"
    disk = bytearray(size)
    choice = random.Random(size)
    for _ in range(8):
        at = choice.randrange(size - 70_000)
        disk[at : at + 70_000] = choice.choice([choice.randbytes(70_000), b"text" * 17_500])
    raw.write_bytes(disk)
    qemu("qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", f"subformat={subformat}", raw, image)
    assert by_tapfs(image) == disk
    assert tapfs("compare", image, raw).code == 0


@pytest.mark.parametrize("zeroed", ["on", "off"])
def test_what_qemu_writes(tmp_path: Path, zeroed: str, by_tapfs: Callable[[Path], bytes]) -> None:
    image, child = tmp_path / "base.vmdk", tmp_path / "child.vmdk"
    qemu("qemu-img", "create", "-f", "vmdk", "-o", f"zeroed_grain={zeroed}", image, "9M")
    qemu("qemu-io", "-f", "vmdk", "-c", "write -P 1 8M 1M", "-c", "write -P 2 100k 300k", image)
    qemu("qemu-img", "create", "-f", "vmdk", "-o", f"zeroed_grain={zeroed}", "-b", image, "-F", "vmdk", child)
    qemu("qemu-io", "-f", "vmdk", "-c", "write -P 3 3M 77k", "-c", "write -z 128k 128k", child)
    expected = bytearray(9 * MIB)
    expected[8 * MIB :] = b"\1" * MIB
    expected[100 << 10 : 400 << 10] = b"\2" * (300 << 10)
    assert by_tapfs(image) == expected
    expected[3 * MIB : 3 * MIB + (77 << 10)] = b"\3" * (77 << 10)
    expected[128 << 10 : 256 << 10] = bytes(128 << 10)
    assert by_tapfs(child) == expected


def test_a_cowd_that_qemu_writes(tmp_path: Path, by_tapfs: Callable[[Path], bytes]) -> None:
    """With all of its tables: where one is missing qemu-io 7.2 writes the guest's data over the header."""
    size = 9 * MIB
    content = cowd({}, size, all_tables=True)
    path = write_list(tmp_path, [("VMFSSPARSE", "d.vmdk", content)], sizes=[size], create_type="vmfsSparse")
    qemu("qemu-io", "-f", "vmdk", "-c", "write -P 1 8M 64k", "-c", "write -P 2 1000k 300k", path)
    expected = bytearray(size)
    expected[8 * MIB : 8 * MIB + 65536] = b"\1" * 65536
    expected[1000 << 10 : 1300 << 10] = b"\2" * (300 << 10)
    assert by_tapfs(path) == expected


#: Images of the second writer, and who else reads them right.
BUILT: dict[str, tuple[Callable[[random.Random, Path], tuple[Path, bytes]], list[str]]] = {}


def built(*readers: str) -> Callable[[Any], Any]:
    def add(build: Any) -> Any:
        BUILT[build.__name__] = (build, list(readers))
        return build

    return add


@built("qemu", "libvmdk", "dissect", "7zip")
def sparse(choice: random.Random, folder: Path) -> tuple[Path, bytes]:
    grains = random_grains(choice, 8 * MIB, 65536)
    (folder / "disk.vmdk").write_bytes(monolithic(grains, 8 * MIB, grain_sectors=128))
    return folder / "disk.vmdk", read_grains(grains, 8 * MIB, 65536)


@built("qemu", "dissect", "7zip")
def zeroed(choice: random.Random, folder: Path) -> tuple[Path, bytes]:
    """Libvmdk returns sector 1 for an entry of 1."""
    grains = random_grains(choice, 8 * MIB, 65536) | {3: ZERO, 5: ZERO}
    (folder / "disk.vmdk").write_bytes(monolithic(grains, 8 * MIB, grain_sectors=128))
    return folder / "disk.vmdk", read_grains(grains, 8 * MIB, 65536)


@built("qemu", "libvmdk", "dissect")
def split(choice: random.Random, folder: Path) -> tuple[Path, bytes]:
    disks = [random_grains(choice, 4 * MIB, GRAIN) for _ in range(3)]
    parts = [("SPARSE", f"disk-s00{number + 1}.vmdk", hosted(each, 4 * MIB)) for number, each in enumerate(disks)]
    path = write_list(folder, parts, sizes=[4 * MIB] * 3, create_type="twoGbMaxExtentSparse")
    return path, b"".join(read_grains(each, 4 * MIB, GRAIN) for each in disks)


@built("qemu", "dissect", "7zip")
def footer(choice: random.Random, folder: Path) -> tuple[Path, bytes]:
    """Libvmdk takes the marker of a grain table for a grain."""
    grains = random_grains(choice, 8 * MIB, 65536)
    (folder / "disk.vmdk").write_bytes(stream(grains, 8 * MIB))
    return folder / "disk.vmdk", read_grains(grains, 8 * MIB, 65536)


@built("qemu", "dissect")
def esx(choice: random.Random, folder: Path) -> tuple[Path, bytes]:
    size = 5 * MIB
    grains = random_grains(choice, size, 512)
    path = write_list(folder, [("VMFSSPARSE", "d.vmdk", cowd(grains, size))], sizes=[size], create_type="vmfsSparse")
    return path, read_grains(grains, size, 512)


@built("qemu", "dissect")
def space_efficient(choice: random.Random, folder: Path) -> tuple[Path, bytes]:
    size = 36 * MIB
    grains = random_grains(choice, size, 4096, zeros=True)
    path = write_list(folder, [("SESPARSE", "d.vmdk", sesparse(grains, size))], sizes=[size], create_type="seSparse")
    return path, read_grains(grains, size, 4096)


@pytest.mark.parametrize("name", BUILT)
def test_images_of_the_second_writer(tmp_path: Path, name: str, by_tapfs: Callable[[Path], bytes]) -> None:
    build, readers = BUILT[name]
    path, expected = build(random.Random(name), tmp_path)
    assert by_tapfs(path) == expected
    for reader in readers:
        assert READERS[reader](path) == expected, reader


def disk_of(seed: int, size: int) -> bytes:
    choice = random.Random(seed)
    disk = bytearray(size)
    for _ in range(8):
        at = choice.randrange(size - 70_000)
        disk[at : at + 70_000] = choice.choice([choice.randbytes(70_000), b"text" * 17_500])
    return bytes(disk)


#: The subformats that tapfs writes, and who reads them right. 7-Zip reads no VMFS lines, QEMU no offsets of them.
WRITTEN = {
    "monolithicSparse": ["qemu", "libvmdk", "dissect", "7zip"],
    "monolithicFlat": ["qemu", "libvmdk", "dissect", "7zip"],
    "twoGbMaxExtentSparse": ["qemu", "libvmdk", "dissect", "7zip"],
    "twoGbMaxExtentFlat": ["qemu", "libvmdk", "dissect", "7zip"],
    # libvmdk takes the marker of a grain table for a grain.
    "streamOptimized": ["qemu", "dissect", "7zip"],
    "vmfs": ["qemu", "libvmdk", "dissect"],
    "vmfsSparse": ["qemu", "dissect"],
}


@pytest.mark.parametrize("size", [7 * MIB, 3 * MIB + 100 * 1024])
@pytest.mark.parametrize("subformat", WRITTEN)
def test_what_tapfs_converts(tmp_path: Path, subformat: str, size: int, tapfs: Run) -> None:
    raw, image = tmp_path / "raw", tmp_path / "disk.vmdk"
    raw.write_bytes(disk_of(size, size))
    options = ["-o", f"subformat={subformat}"]
    assert tapfs("convert", "-f", "raw", "-O", "vmdk", *options, raw, image) == DONE
    for reader in WRITTEN[subformat]:
        # dissect cannot read the last grain of a disk that is no whole number of grains.
        if reader != "dissect" or size % 65536 == 0:
            assert READERS[reader](image) == raw.read_bytes(), reader
    if subformat == "monolithicSparse":
        qemu("qemu-img", "check", "-f", "vmdk", image)


@pytest.mark.parametrize("zeroed", ["on", "off"])
@pytest.mark.parametrize("first", ["qemu", "tapfs"])
def test_both_write_one_image_in_turn(tmp_path: Path, zeroed: str, first: str, tapfs: Run) -> None:
    """Each goes on with the tables, the zeros and the content ID that the other has left."""
    image, child = tmp_path / "base.vmdk", tmp_path / "child.vmdk"
    options = f"zeroed_grain={zeroed}"
    if first == "qemu":
        qemu("qemu-img", "create", "-f", "vmdk", "-o", options, image, "9M")
        qemu("qemu-img", "create", "-f", "vmdk", "-o", options, "-b", image, "-F", "vmdk", child)
    else:
        assert tapfs("create", "-f", "vmdk", "-o", options, image, "9M") == DONE
        assert tapfs("create", "-f", "vmdk", "-o", options, "-b", image, "-F", "vmdk", child) == DONE
    expected = bytearray(9 * MIB)
    choice = random.Random(zeroed)
    for number in range(12):
        at, length = choice.randrange(8 * MIB) // 512 * 512, choice.choice([512, 70_144, 1 << 18])
        zero = choice.random() < 0.3
        if number % 2:
            command = f"write -z {at} {length}" if zero else f"write -P {number} {at} {length}"
            qemu("qemu-io", "-f", "vmdk", "-c", command, child)
        else:
            with tapfs_package.open(child, writable=True) as disk:
                if zero:
                    disk.write_zeroes(at, length)
                else:
                    disk.write(at, bytes([number]) * length)
        expected[at : at + length] = bytes([0 if zero else number]) * length
        assert by_qemu(child) == expected
        assert tapfs("check", child).code == 0
    with tapfs_package.open(child) as disk:
        assert disk.read(0, disk.size) == expected


@pytest.mark.parametrize("subformat", ["twoGbMaxExtentSparse", "monolithicFlat", "vmfsSparse"])
def test_lists_that_both_write(tmp_path: Path, subformat: str, tapfs: Run) -> None:
    image = tmp_path / "disk.vmdk"
    assert tapfs("create", "-f", "vmdk", "-o", f"subformat={subformat}", image, "9M") == DONE
    with tapfs_package.open(image, writable=True) as disk:
        # qemu-io writes only where a COWD has tables.
        for at in range(0, 9 * MIB, MIB):
            disk.write(at, b"tapfs")
    qemu("qemu-io", "-f", "vmdk", "-c", "write -P 1 3M 300k", image)
    with tapfs_package.open(image, writable=True) as disk:
        disk.write(3 * MIB + 1000, b"again")
    expected = bytearray(9 * MIB)
    for at in range(0, 9 * MIB, MIB):
        expected[at : at + 5] = b"tapfs"
    expected[3 * MIB : 3 * MIB + (300 << 10)] = b"\1" * (300 << 10)
    expected[3 * MIB + 1000 : 3 * MIB + 1005] = b"again"
    assert by_qemu(image) == expected
    if subformat == "vmfsSparse":  # qemu-io does not move the place where ESX puts the next grain
        assert "the next grain would go to" in tapfs("check", image).out
        assert tapfs("repair", image).code == 0
    assert tapfs("check", image).code == 0
