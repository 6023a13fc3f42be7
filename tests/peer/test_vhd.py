"""VHDs both ways with QEMU 10, and read by libvhdi, dissect and 7-Zip.

docs/specs/vhd.md, "What the peers of the tests do", says who is right where they differ. QEMU 7.2 takes another size
for most creators, so it is no peer here.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tapfs as tapfs_package
from tests.conftest import Ran
from tests.peer.newest_qemu import newest_qemu
from tests.vhd_images import FIXED, PARENTS, Block, Vhd, by_bytes, differencing, ignoring_bitmaps, write_to

Run = Callable[..., Ran]
DONE = (0, "", "")
MIB = 1 << 20
BLOCK = 2 * MIB

CHOICE = random.Random(4)
#: Whole pages of sectors, and any sectors.
PAGES = tuple(present for _ in range(512) for present in (CHOICE.random() < 0.7,) * 8)
SECTORS = tuple(CHOICE.random() < 0.9 for _ in range(4096))
WHOLE = Vhd(
    size=3 * BLOCK - 4096,
    block_size=BLOCK,
    blocks={0: Block(CHOICE.randbytes(BLOCK)), 2: Block(CHOICE.randbytes(BLOCK))},
)


def qemu(program: str, *words: object, code: int = 0) -> str:
    done = subprocess.run([newest_qemu(program), *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def by_qemu(path: Path) -> bytes:
    raw = path.with_suffix(".qemu")
    qemu("qemu-img", "convert", "-f", "vpc", "-O", "raw", path, raw)
    return raw.read_bytes()


#: Each leaves its files open, and a damaged image is nothing to show a library in the process of the tests.
_LIBVHDI = """
import sys, pyvhdi
files = [pyvhdi.file() for _ in sys.argv[1:]]
for file, path in zip(files, sys.argv[1:]):
    file.open(path)
for child, parent in zip(files, files[1:]):
    child.set_parent(parent)
sys.stdout.buffer.write(files[0].read_buffer(files[0].get_media_size()))
"""
_DISSECT = """
import sys
from dissect.hypervisor.disk.vhd import VHD
disk = VHD(open(sys.argv[1], "rb"))
sys.stdout.buffer.write(disk.read(disk.size))
"""


def by_program(program: str, *paths: Path) -> bytes:
    done = subprocess.run([sys.executable, "-c", program, *paths], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def by_libvhdi(*paths: Path) -> bytes:
    return by_program(_LIBVHDI, *paths)


def by_dissect(path: Path) -> bytes:
    return by_program(_DISSECT, path)


def by_7zip(path: Path) -> bytes:
    done = subprocess.run(["7zz", "e", "-so", "-tvhd", path], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


READERS: dict[str, Callable[[Path], bytes]] = {
    "qemu": by_qemu,
    "libvhdi": by_libvhdi,
    "dissect": by_dissect,
    "7zip": by_7zip,
}


def by_tapfs(path: Path, **options: Any) -> bytes:
    with tapfs_package.open(path, **options) as disk:
        return disk.read(0, disk.size)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A disk of 9 MiB and a half with data in some places."""
    disk = bytearray(9 * MIB + MIB // 2)
    for _ in range(12):
        at = CHOICE.randrange(len(disk) - 70_000)
        disk[at : at + 70_000] = CHOICE.choice([CHOICE.randbytes(70_000), b"text" * 17_500])
    path = tmp_path / "disk.raw"
    path.write_bytes(disk)
    return path


@pytest.mark.parametrize("force_size", ["on", "off"])
@pytest.mark.parametrize("subformat", ["dynamic", "fixed"])
def test_what_qemu_converts(tapfs: Run, tmp_path: Path, raw: Path, subformat: str, force_size: str) -> None:
    image = tmp_path / "a.vhd"
    options = f"subformat={subformat},force_size={force_size}"
    qemu("qemu-img", "convert", "-f", "raw", "-O", "vpc", "-o", options, raw, image)
    disk = raw.read_bytes()
    read = by_tapfs(image)
    assert read == disk.ljust(len(read), b"\0") == by_qemu(image)
    assert (len(read) == len(disk)) == (force_size == "on")
    assert tapfs("check", "-q", image).code == 0


@pytest.mark.parametrize(
    "options", [(), ("subformat=fixed",), ("azure=on",), ("force_size=off",), ("block_size=4194304",)]
)
def test_what_tapfs_converts_all_read(tapfs: Run, tmp_path: Path, raw: Path, options: tuple[str, ...]) -> None:
    image = tmp_path / "a.vhd"
    words = [word for option in options for word in ("-o", option)]
    assert tapfs("convert", "-f", "raw", "-O", "vhd", *words, raw, image) == DONE
    disk = raw.read_bytes()
    for name, read in READERS.items():
        found = read(image)
        assert found == disk.ljust(len(found), b"\0"), name
        assert len(found) >= len(disk), name


@pytest.mark.parametrize("subformat", ["dynamic", "fixed"])
@pytest.mark.parametrize("force_size", ["on", "off"])
def test_a_new_image_is_qemus(tapfs: Run, tmp_path: Path, subformat: str, force_size: str) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    options = f"subformat={subformat},force_size={force_size}"
    assert (
        tapfs("create", "-f", "vhd", "-o", f"subformat={subformat}", "-o", f"force_size={force_size}", ours, "70M")
        == DONE
    )
    qemu("qemu-img", "create", "-f", "vpc", "-o", options, theirs, "70M")

    def without_what_is_its_own(path: Path) -> bytes:
        content = bytearray(path.read_bytes())
        for footer in {0, len(content) - 512} if subformat == "dynamic" else {len(content) - 512}:
            for start, stop in ((24, 28), (64, 68), (68, 84)):  # timestamp, checksum, UUID
                content[footer + start : footer + stop] = bytes(stop - start)
        return bytes(content)

    assert without_what_is_its_own(ours) == without_what_is_its_own(theirs)


def scattered(size: int) -> list[tuple[int, int, int]]:
    """Writes of whole sectors: pattern, offset, length."""
    found: list[tuple[int, int, int]] = []
    for pattern in range(1, 80):
        length = 512 * CHOICE.choice((1, 2, 7, 8, 64, 700))
        found.append((pattern, 512 * CHOICE.randrange((size - length) // 512), length))
    return found


def test_both_write_one_image_in_turn(tapfs: Run, tmp_path: Path) -> None:
    image, size = tmp_path / "a.vhd", 24 * MIB
    assert tapfs("create", "-f", "vhd", image, size) == DONE
    expected = bytearray(size)
    for _ in range(3):
        writes = scattered(size)
        commands = [word for each in writes for word in ("-c", "write -P {} {} {}".format(*each))]
        qemu("qemu-io", "-f", "vpc", *commands, image)
        for pattern, offset, length in writes:
            expected[offset : offset + length] = bytes([pattern]) * length
        assert by_tapfs(image) == expected
        with tapfs_package.open(image, writable=True) as disk:
            for pattern, offset, length in scattered(size):
                disk.write(offset, bytes([pattern]) * length)
                expected[offset : offset + length] = bytes([pattern]) * length
            hole = CHOICE.randrange(8) * BLOCK
            disk.write_zeroes(hole, BLOCK + 5000)
            expected[hole : hole + BLOCK + 5000] = bytes(BLOCK + 5000)
        assert by_qemu(image) == expected
        assert tapfs("check", "-q", image).code == 0
    assert by_libvhdi(image) == by_dissect(image) == by_7zip(image) == expected


BUILT: dict[str, Vhd] = {
    "whole blocks": WHOLE,
    "gaps between blocks": replace(WHOLE, gap=3584),
    "blocks of 16 KiB": Vhd(size=5 * 16384, blocks={1: Block(CHOICE.randbytes(16384))}),
    "fixed": Vhd(type=FIXED, size=MIB, body=CHOICE.randbytes(MIB)),
    "batmap": replace(WHOLE, creator=b"tap\0", creator_version=0x10003, batmap=(True, False, True)),
}


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("reader", READERS)
def test_all_agree_on_images_of_other_programs(tmp_path: Path, name: str, reader: str) -> None:
    path = write_to(tmp_path / "a.vhd", BUILT[name])
    assert by_tapfs(path) == READERS[reader](path)


def test_a_table_that_is_larger_than_the_disk(tmp_path: Path) -> None:
    """The tools of xapi reserve room to grow. 7-Zip refuses such an image."""
    path = write_to(tmp_path / "a.vhd", replace(WHOLE, spare_entries=500))
    for read in (by_qemu, by_libvhdi, by_dissect):
        assert read(path) == by_tapfs(path)
    assert subprocess.run(["7zz", "t", "-tvhd", path], capture_output=True, check=False).returncode == 2


def test_sectors_without_their_bits(tmp_path: Path) -> None:
    """QEMU and dissect ignore bitmaps, 7-Zip stops. libvhdi honours them, but ends a run at whole bytes only."""
    pages = replace(WHOLE, blocks={1: Block(CHOICE.randbytes(BLOCK), PAGES)})
    path = write_to(tmp_path / "a.vhd", pages)
    assert by_tapfs(path) == by_libvhdi(path) == by_bytes(pages.content())
    assert by_qemu(path) == by_dissect(path) == ignoring_bitmaps(pages.content())
    done = subprocess.run(["7zz", "t", "-tvhd", path], capture_output=True, check=False, text=True)
    assert (done.returncode, "Data Error" in done.stdout + done.stderr) == (2, True)
    sectors = replace(WHOLE, blocks={1: Block(CHOICE.randbytes(BLOCK), SECTORS)})
    path = write_to(tmp_path / "b.vhd", sectors)
    assert by_tapfs(path) == by_bytes(sectors.content()) != by_libvhdi(path)


def test_a_differencing_image(tmp_path: Path) -> None:
    """7-Zip finds the parent by its name, libvhdi is given it. QEMU and dissect read zeros in its place."""
    base = write_to(tmp_path / "base.vhd", replace(WHOLE, uuid=PARENTS))
    child = differencing(
        size=WHOLE.size,
        block_size=BLOCK,
        blocks={0: Block(CHOICE.randbytes(BLOCK), SECTORS), 1: Block(CHOICE.randbytes(BLOCK))},
    )
    path = write_to(tmp_path / "child.vhd", child)
    expected = by_bytes(child.content(), by_bytes(WHOLE.content()))
    assert by_tapfs(path) == by_7zip(path) == expected
    assert by_qemu(path) == by_dissect(path) == ignoring_bitmaps(child.content()) != expected
    pages = replace(child, blocks={0: Block(CHOICE.randbytes(BLOCK), PAGES)})
    path = write_to(tmp_path / "pages.vhd", pages)
    assert by_tapfs(path) == by_libvhdi(path, base) == by_bytes(pages.content(), by_bytes(WHOLE.content()))


def test_a_differencing_image_of_tapfs(tapfs: Run, tmp_path: Path) -> None:
    base, child = write_to(tmp_path / "base.vhd", WHOLE), tmp_path / "child.vhd"
    assert tapfs("create", "-f", "vhd", "-b", "base.vhd", "-F", "vhd", child) == DONE
    expected = bytearray(by_bytes(WHOLE.content()))
    with tapfs_package.open(child, writable=True) as disk:
        for pattern, start, wanted in scattered(WHOLE.size - 4096):
            offset, length = start // 4096 * 4096, -(-wanted // 4096) * 4096
            disk.write(offset, bytes([pattern]) * length)
            expected[offset : offset + length] = bytes([pattern]) * length
        disk.write_zeroes(8192, 40960)
        expected[8192 : 8192 + 40960] = bytes(40960)
    assert by_7zip(child) == by_libvhdi(child, base) == by_tapfs(child) == expected


@pytest.mark.parametrize(
    "creator", [b"vpc ", b"qemu", b"win ", b"qem2", b"d2v ", b"CTXS", b"tap\0", b"wa\0\0", b"vbox", bytes(4)]
)
def test_the_size_is_that_of_qemu_10(tmp_path: Path, creator: bytes) -> None:
    """libvhdi, dissect and 7-Zip take the current size whoever made the image."""
    image = Vhd(type=FIXED, size=10 * MIB, body=b"x", creator=creator, geometry=(301, 4, 17))
    path = write_to(tmp_path / "a.vhd", image)
    assert len(by_tapfs(path)) == len(by_qemu(path))
    assert {len(read(path)) for read in (by_libvhdi, by_dissect, by_7zip)} == {10 * MIB}


@pytest.mark.parametrize(
    ("damage", "readers"),
    [
        ("no footer at the end", {"qemu"}),
        ("no copy at the start", {"libvhdi", "dissect"}),
        ("wrong checksums", {"libvhdi", "dissect"}),
        ("wrong checksum of the header", {"qemu", "libvhdi", "dissect"}),
    ],
)
def test_who_reads_a_damaged_image(tmp_path: Path, damage: str, readers: set[str]) -> None:
    content = bytearray(WHOLE.content())
    match damage:
        case "no footer at the end":
            del content[-512:]
        case "no copy at the start":
            content[:512] = bytes(512)
        case "wrong checksums":
            content[64] ^= 1
            content[-512 + 64] ^= 1
        case _:
            content[512 + 36] ^= 1
    path = tmp_path / "a.vhd"
    path.write_bytes(content)
    assert by_tapfs(path) == by_bytes(WHOLE.content())
    able = set[str]()
    for name, read in READERS.items():
        try:
            able |= {name} if read(path) == by_bytes(WHOLE.content()) else set()
        except AssertionError:
            continue
    assert able == readers


def test_a_footer_of_511_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.vhd"
    path.write_bytes(BUILT["fixed"].content()[:-1])
    assert by_tapfs(path) == by_qemu(path) == by_dissect(path) == BUILT["fixed"].body


def test_junk_before_the_footer(tmp_path: Path) -> None:
    fixed = BUILT["fixed"]
    path = tmp_path / "a.vhd"
    path.write_bytes(fixed.body + b"\x77" * 1024 + fixed.footer())
    assert by_tapfs(path) == by_qemu(path) == by_libvhdi(path) == by_dissect(path) == fixed.body
    assert by_7zip(path) != fixed.body
