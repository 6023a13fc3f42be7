"""VHDX there and back with qemu-img, 7-Zip, libvhdi and dissect.

QEMU has no differencing images and no sectors of 4096 bytes. libvhdi and dissect do not look at the log, and return
zeros for a dirty image (docs/specs/vhdx.md, "Log"). 7-Zip reads all but a dirty one, and is the strictest.
"""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pyvhdi  # type: ignore[import-untyped]

import tapfs as library
from tests.bench.runner import qemu_backports
from tests.conftest import Ran
from tests.peer.test_convert import qemu
from tests.vhdx_images import (
    BAT_AT,
    BLOCKS_AT,
    KINDS,
    MIB,
    PARENT_GUID,
    PARTIAL,
    PRESENT,
    Entry,
    Image,
    make,
    named_parent,
    put_log,
)

Run = Callable[..., Ran]
#: 7-Zip refuses a disk whose size is no multiple of eight sectors; qemu-img makes such disks, too.
SIZE = 37 * MIB + 4096 * 3
HAND_SIZE = 5 * MIB + (32 << 10)

#: The options that qemu-img has for new images; tapfs takes the same words.
OPTIONS = [
    "subformat=dynamic",
    "subformat=dynamic,block_size=1M,block_state_zero=off",
    "subformat=dynamic,block_size=2M,log_size=2M",
    "subformat=fixed",
    "subformat=fixed,block_state_zero=off,block_size=4M",
]


@pytest.fixture(scope="session", params=["system", "backports"])
def programs(request: pytest.FixtureRequest) -> Path:
    """The folder of QEMU's programs: the installed ones, and those of Debian's backports (10 or newer)."""
    if request.param == "system":
        return Path("/usr/bin")
    newer = qemu_backports()
    assert newer is not None, "QEMU of Debian's backports cannot be had"
    return newer


def noise(size: int, seed: int = 1) -> bytes:
    """A disk with runs of data, of zeros, and of data that begins and ends anywhere."""
    choice = random.Random(seed)
    out = bytearray(size)
    for _ in range(30):
        at = choice.randrange(size)
        piece = choice.randbytes(min(choice.choice([512, 5000, 700_000]), size - at))
        out[at : at + len(piece)] = piece
    return bytes(out)


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("raw") / "disk.raw"
    path.write_bytes(noise(SIZE))
    return path


@pytest.mark.parametrize("options", OPTIONS)
def test_what_qemu_writes_is_read(tapfs: Run, programs: Path, raw: Path, tmp_path: Path, options: str) -> None:
    image = tmp_path / "a.vhdx"
    qemu(programs / "qemu-img", "convert", "-f", "raw", "-O", "vhdx", "-o", options, raw, image)
    assert tapfs("compare", raw, image).code == 0
    assert tapfs("check", image).code == 0
    words = ["-f", "vhdx", "-c", "write -P 7 5M 3M", "-c", "write -z 1M 9M", "-c", "flush"]
    qemu(programs / "qemu-io", *words, image)
    with library.open(image) as disk:
        assert disk.read(0, 11 * MIB) == raw.read_bytes()[:MIB] + bytes(9 * MIB) + raw.read_bytes()[10 * MIB : 11 * MIB]


@pytest.mark.parametrize("options", OPTIONS)
def test_what_tapfs_writes_is_read(tapfs: Run, programs: Path, raw: Path, tmp_path: Path, options: str) -> None:
    image = tmp_path / "a.vhdx"
    assert tapfs("convert", "-O", "vhdx", "-o", options, raw, image).code == 0
    qemu(programs / "qemu-img", "compare", "-f", "raw", "-F", "vhdx", raw, image)
    qemu(programs / "qemu-img", "check", "-f", "vhdx", image)
    # QEMU goes on where tapfs has stopped, and the other way round.
    qemu(programs / "qemu-io", "-f", "vhdx", "-c", "write -P 9 20M 2M", image)
    with library.open(image, writable=True) as disk:
        disk.write_zeroes(20 * MIB, MIB)
        disk.write(30 * MIB, b"tapfs" * 1000)
    expected = bytearray(raw.read_bytes())
    expected[20 * MIB : 22 * MIB] = bytes(MIB) + b"\x09" * MIB
    expected[30 * MIB : 30 * MIB + 5000] = b"tapfs" * 1000
    (tmp_path / "expected").write_bytes(expected)
    qemu(programs / "qemu-img", "compare", "-f", "raw", "-F", "vhdx", tmp_path / "expected", image)
    assert by_seven_zip(image) == expected


def test_qemu_replays_what_a_kill_left_in_the_log(programs: Path, tmp_path: Path) -> None:
    """A dirty image of tapfs: QEMU refuses to read it without its repair, and then reads the same."""
    image = tmp_path / "a.vhdx"
    qemu(programs / "qemu-img", "create", "-f", "vhdx", "-o", "block_size=1M", image, "8M")
    child = os.fork()
    if child == 0:
        disk = library.open(image, writable=True)
        disk.write(3 * MIB, b"safe" * 1000)
        disk.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    with library.open(image) as disk:
        expected = disk.read(0, disk.size)
    assert expected[3 * MIB :].startswith(b"safe" * 1000)
    qemu(programs / "qemu-img", "compare", "-f", "vhdx", "-F", "vhdx", image, image, code=2)
    qemu(programs / "qemu-img", "check", "-f", "vhdx", "-r", "all", image)
    (tmp_path / "expected").write_bytes(expected)
    qemu(programs / "qemu-img", "compare", "-f", "raw", "-F", "vhdx", tmp_path / "expected", image)


# -- readers of everything else --------------------------------------------------------------------


def by_seven_zip(path: Path) -> bytes:
    words = ["7zz", "e", "-so", "-tvhdx", path]
    done = subprocess.run(words, capture_output=True, check=False, cwd=path.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


def by_libvhdi(path: Path, parent: Path | None = None) -> bytes:
    opened: list[Any] = []
    for each in [path] if parent is None else [path, parent]:
        file = pyvhdi.file()
        file.open(str(each))
        opened.append(file)
    if parent is not None:
        opened[0].set_parent(opened[1])
    found: bytes = opened[0].read_buffer_at_offset(opened[0].media_size, 0)
    return found


def by_dissect(path: Path) -> bytes:
    """In a process of its own, because dissect leaves files open."""
    program = """
import pathlib, sys
from dissect.hypervisor.disk.vhdx import VHDX
disk = VHDX(pathlib.Path(sys.argv[1]))
disk.seek(0)
sys.stdout.buffer.write(disk.read(disk.size))
"""
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def written_by_hand(folder: Path, kind: str, seed: int) -> tuple[Path, bytes, bytes]:
    """An image of a kind in "a.vhdx", with "p.vhdx" below it; its content, and the parent's."""
    data, below = make(kind, HAND_SIZE, seed)
    if below:
        # The parent is as long as its child: the three readers fail behind the end of a shorter one.
        below = below.ljust(HAND_SIZE, b"e")
        sector = 4096 if "large" in kind else 512
        blocks = {at // MIB: (PRESENT, below[at : at + MIB]) for at in range(0, len(below), MIB)}
        (folder / "p.vhdx").write_bytes(Image(len(below), sector=sector, blocks=blocks, data=PARENT_GUID).build())
    path = folder / "a.vhdx"
    path.write_bytes(data)
    return path, bytes(data), below


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "unlogged"])
def test_every_reader_sees_the_same(tmp_path: Path, kind: str, seed: int) -> None:
    path, _, below = written_by_hand(tmp_path, kind, seed)
    with library.open(path) as disk:
        seen = disk.read(0, disk.size)
    assert by_seven_zip(path) == seen
    if not below:
        assert by_libvhdi(path) == seen
    assert by_dissect(path) == seen


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", ["dynamic", "large sectors", "differencing", "differencing large sectors"])
def test_every_reader_sees_what_tapfs_wrote(tmp_path: Path, kind: str, seed: int) -> None:
    path, _, below = written_by_hand(tmp_path, kind, seed)
    choice = random.Random(seed)
    with library.open(path, writable=True) as disk:
        expected = bytearray(disk.read(0, disk.size))
        for _ in range(30):
            at = choice.randrange(disk.size - 100_000)
            piece = choice.randbytes(choice.choice([10, 5000, 90_000]))
            disk.write(at, piece)
            expected[at : at + len(piece)] = piece
            if choice.random() < 0.3:
                start, length = choice.randrange(5) * MIB, choice.choice([4096, 3 * MIB // 2, MIB])
                length = min(length, disk.size - start)
                disk.write_zeroes(start, length)
                expected[start : start + length] = bytes(length)
    assert by_seven_zip(path) == expected
    if not below:
        assert by_libvhdi(path) == expected
    assert by_dissect(path) == expected


def test_an_overlay_of_tapfs_is_read_by_others(tapfs: Run, raw: Path, tmp_path: Path) -> None:
    base, top = tmp_path / "base.vhdx", tmp_path / "top.vhdx"
    assert tapfs("convert", "-O", "vhdx", "-o", "block_size=1M", raw, base).code == 0
    assert tapfs("create", "-f", "vhdx", "-b", "base.vhdx", "-F", "vhdx", top).code == 0
    with library.open(top, writable=True) as disk:
        disk.write(12345, b"overlay" * 10_000)
        expected = disk.read(0, disk.size)
    assert by_seven_zip(top) == expected
    assert by_dissect(top) == expected
    assert by_libvhdi(top, base) == expected


def dirty(path: Path) -> bytes:
    """An image whose only block is in its log; what it shows."""
    block = random.Random(1).randbytes(MIB)
    data = Image(2 * MIB).build() + block
    entry = struct.pack("<Q", BLOCKS_AT | PRESENT).ljust(4096, b"\0")
    put_log(data, [Entry(1, [(BAT_AT, entry)], flushed=len(data), last=len(data))])
    path.write_bytes(data)
    return block + bytes(MIB)


def test_what_others_make_of_a_dirty_image(programs: Path, tmp_path: Path) -> None:
    """QEMU and 7-Zip refuse it, libvhdi and dissect show zeros; tapfs shows what QEMU shows after a replay."""
    path = tmp_path / "a.vhdx"
    expected = dirty(path)
    with library.open(path) as disk:
        assert disk.read(0, disk.size) == expected
    assert by_libvhdi(path) == bytes(2 * MIB)
    assert by_dissect(path) == bytes(2 * MIB)
    done = subprocess.run(["7zz", "e", "-so", "-tvhdx", path], capture_output=True, check=False)
    assert (done.returncode, done.stdout == expected) != (0, True)
    qemu(programs / "qemu-img", "check", "-f", "vhdx", "-r", "all", path)
    (tmp_path / "expected").write_bytes(expected)
    qemu(programs / "qemu-img", "compare", "-f", "raw", "-F", "vhdx", tmp_path / "expected", path)


def test_zeros_hide_the_parent(tmp_path: Path) -> None:
    """Libvhdi returns the parent for the states 1, 2 and 3; the text, 7-Zip and dissect say zeros."""
    blocks = {number: (number, b"") for number in (1, 2, 3)}
    image = Image(5 * MIB, blocks={**blocks, 4: (PARTIAL, b"c" * MIB)}, sectors={4: [0]}, parent=named_parent("p.vhdx"))
    (tmp_path / "a.vhdx").write_bytes(image.build())
    parent = Image(5 * MIB, blocks=dict.fromkeys(range(5), (PRESENT, b"p" * MIB)), data=PARENT_GUID)
    (tmp_path / "p.vhdx").write_bytes(parent.build())
    expected = b"p" * MIB + bytes(3 * MIB) + b"c" * 512 + b"p" * (MIB - 512)
    with library.open(tmp_path / "a.vhdx") as disk:
        assert disk.read(0, disk.size) == expected
    assert by_seven_zip(tmp_path / "a.vhdx") == expected
    assert by_dissect(tmp_path / "a.vhdx") == expected
    assert by_libvhdi(tmp_path / "a.vhdx", tmp_path / "p.vhdx") == b"p" * (4 * MIB) + b"c" * 512 + b"p" * (MIB - 512)
