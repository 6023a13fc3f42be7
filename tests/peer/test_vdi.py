"""VDI both ways with QEMU, read beside 7-Zip and dissect, and where these are wrong (docs/specs/vdi.md, "Peers")."""

from __future__ import annotations

import io
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from dissect.hypervisor.disk.vdi import VDI

import tapfs
from tapfs import ErrorKind, ImageError
from tests.conftest import Ran
from tests.peer.test_convert import disk_after, qemu, scattered_writes, written_by_qemu_io
from tests.vdi_images import CREATION, DIFFERENCING, FREE, MIB, MODIFICATION, ZERO, VdiImage

pytestmark = pytest.mark.usefixtures("each_qemu")

Run = Callable[..., Ran]
BLOCKS = {0: b"a" * MIB, 1: b"b" * MIB, 2: b"c" * MIB}


@pytest.fixture(name="command")
def command_fixture(request: pytest.FixtureRequest) -> Run:
    """The command in this process, beside the package of the same name."""
    command: Run = request.getfixturevalue("tapfs")
    return command


def by_qemu(image: Path) -> bytes:
    target = image.with_name("read-by-qemu.raw")
    qemu("qemu-img", "convert", "-f", "vdi", "-O", "raw", image, target)
    return target.read_bytes()


def by_7zip(image: Path) -> bytes:
    return subprocess.run(["7zz", "e", "-so", "-tvdi", image], capture_output=True, check=True).stdout


def by_dissect(image: Path, parent: bytes | None = None) -> bytes:
    """Block by block: dissect 3.21 takes what a longer read wants of further blocks from behind the first one."""
    with VDI(image, None if parent is None else io.BytesIO(parent)) as disk:
        stream = disk.open()
        return b"".join(stream.read(disk.block_size) for _ in range(0, disk.size, disk.block_size))


def by_tapfs(image: Path) -> bytes:
    with tapfs.open(image) as disk:
        return disk.read(0, disk.size)


@pytest.mark.parametrize("options", [(), ("-o", "static=on")])
def test_tapfs_reads_what_qemu_converts(command: Run, sample: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    image = tmp_path / "a.vdi"
    qemu("qemu-img", "convert", *options, "-f", "raw", "-O", "vdi", sample, image)
    assert by_tapfs(image) == sample.read_bytes()
    assert command("check", image).code == 0


@pytest.mark.parametrize("options", [(), ("-o", "static=on"), ("-o", "preallocation=metadata")])
def test_the_others_read_what_tapfs_converts(
    command: Run, sample: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    image = tmp_path / "a.vdi"
    assert command("convert", *options, "-f", "raw", "-O", "vdi", sample, image).code == 0
    expected = sample.read_bytes()
    qemu("qemu-img", "check", "-f", "vdi", image)
    assert by_qemu(image) == expected
    assert by_7zip(image) == expected
    assert by_dissect(image) == expected


@pytest.mark.parametrize("backwards", [False, True])
def test_what_qemu_io_writes_here_and_there_is_read(tmp_path: Path, *, backwards: bool) -> None:
    image = tmp_path / "a.vdi"
    qemu("qemu-img", "create", "-f", "vdi", image, 24 * MIB)
    writes = scattered_writes(24 * MIB, backwards=backwards)
    written_by_qemu_io(image, writes, "-f", "vdi")
    assert by_tapfs(image) == disk_after(24 * MIB, writes)


def test_tapfs_and_qemu_write_one_image_in_turn(tmp_path: Path) -> None:
    """Zeros, discards and new blocks of tapfs leave the places of the blocks without gaps, which QEMU counts on."""
    image = tmp_path / "a.vdi"
    qemu("qemu-img", "create", "-f", "vdi", image, 24 * MIB)
    expected = bytearray(24 * MIB)
    for turn in range(4):
        writes = scattered_writes(24 * MIB, backwards=bool(turn % 2))[turn::6]
        written_by_qemu_io(image, writes, "-f", "vdi")
        expected[:] = disk_after(24 * MIB, writes, bytes(expected))
        with tapfs.open(image, writable=True) as disk:
            disk.discard(turn * 3 * MIB, MIB)
            disk.write_zeroes((turn * 5 + 1) * MIB, 2 * MIB)
            disk.write((turn * 7 % 24) * MIB + 99, b"tapfs" * 300)
            after = disk.read(0, disk.size)
        assert after[: turn * 3 * MIB] == bytes(expected[: turn * 3 * MIB]) or turn
        expected[:] = after
        qemu("qemu-img", "check", "-f", "vdi", image)
        assert by_qemu(image) == by_7zip(image) == by_tapfs(image) == bytes(expected)


def test_a_map_is_qemus(command: Run, tmp_path: Path) -> None:
    image = tmp_path / "a.vdi"
    qemu("qemu-img", "create", "-f", "vdi", image, 24 * MIB)
    written_by_qemu_io(image, scattered_writes(24 * MIB, backwards=False)[:9], "-f", "vdi")
    theirs = qemu("qemu-img", "map", "-f", "vdi", image).splitlines()[1:]
    ours = command("map", image).out.splitlines()[1:]
    assert [row.split()[:3] for row in ours] == [
        ["0x" + word[2:] if word != "0" else "0x0" for word in row.split()[:3]] for row in theirs
    ]


@pytest.mark.parametrize(
    "image",
    [
        VdiImage(4 * MIB, [2, FREE, 0, 1], BLOCKS),
        VdiImage(3 * MIB, [ZERO, 0, FREE], {0: b"a" * MIB}),
        VdiImage(3 * MIB, [1, 0, 2], BLOCKS, map_at=512, data_at=1024, header_length=0x180),
    ],
)
def test_what_no_program_here_writes_is_read_alike(image: VdiImage, tmp_path: Path) -> None:
    path = tmp_path / "a.vdi"
    path.write_bytes(image.content())
    assert by_tapfs(path) == by_qemu(path) == by_7zip(path) == by_dissect(path) == image.guest()


def test_blocks_of_other_sizes_are_read_as_dissect_reads_them(tmp_path: Path) -> None:
    """QEMU and 7-Zip refuse them."""
    small = 128 << 10
    image = VdiImage(4 * small, [1, FREE, 0, ZERO], {0: b"a" * small, 1: b"b" * small}, block=small)
    path = tmp_path / "a.vdi"
    path.write_bytes(image.content())
    assert by_tapfs(path) == by_dissect(path) == image.guest()


def test_a_differencing_image_is_read_as_dissect_reads_it_over_the_right_parent(tmp_path: Path) -> None:
    """QEMU and 7-Zip refuse it; dissect takes any parent, and none for zeros."""
    parent = VdiImage(3 * MIB, [1, 0, 2], BLOCKS)
    child = VdiImage(3 * MIB, [FREE, ZERO, 0], {0: b"x" * MIB}, DIFFERENCING, creation=MODIFICATION, link=CREATION)
    path = tmp_path / "child.vdi"
    path.write_bytes(child.content())
    with pytest.raises(ImageError):
        tapfs.open(path)
    assert by_dissect(path) == child.guest()  # zeros where the parent's data belong
    (tmp_path / "parent.vdi").write_bytes(parent.content())
    expected = child.guest(parent.guest())
    assert by_tapfs(path) == by_dissect(path, parent.guest()) == expected


# -- where the others are wrong ----------------------------------------------------------------------


def test_only_tapfs_reads_past_the_extra_bytes_before_each_block(tmp_path: Path) -> None:
    image = VdiImage(2 * MIB, [0, 1], BLOCKS, extra=512)
    path = tmp_path / "a.vdi"
    path.write_bytes(image.content())
    assert by_tapfs(path) == image.guest()
    for wrong in (by_qemu(path), by_7zip(path), by_dissect(path)):
        assert wrong.startswith(b"x" * 512)


def test_what_the_end_of_the_file_cuts_off_is_no_zeros_to_tapfs(tmp_path: Path) -> None:
    image = VdiImage(2 * MIB, [0, 1], {0: BLOCKS[0], 1: BLOCKS[1]})
    path = tmp_path / "a.vdi"
    path.write_bytes(image.content()[: -MIB // 2])
    qemu("qemu-img", "check", "-f", "vdi", path)
    assert by_qemu(path)[-MIB // 2 :] == bytes(MIB // 2)
    with pytest.raises(ImageError) as caught:
        by_tapfs(path)
    assert caught.value.kind is ErrorKind.CORRUPT


def test_a_differencing_image_without_a_link_is_no_base_to_tapfs(tmp_path: Path) -> None:
    path = tmp_path / "a.vdi"
    path.write_bytes(VdiImage(MIB, [FREE], kind=DIFFERENCING).content())
    assert by_qemu(path) == bytes(MIB)
    with pytest.raises(ImageError) as caught:
        by_tapfs(path)
    assert caught.value.kind is ErrorKind.CORRUPT


def test_dissect_takes_the_old_header_for_the_new_one(tmp_path: Path) -> None:
    """QEMU and 7-Zip refuse version 0.2; tapfs reads it as VirtualBox does."""
    image = VdiImage(2 * MIB, [0, FREE], {0: BLOCKS[0]}, old=True)
    path = tmp_path / "a.vdi"
    path.write_bytes(image.content())
    assert by_tapfs(path) == image.guest()
    qemu("qemu-img", "info", "-f", "vdi", path, code=1)
    with VDI(path) as disk:
        assert disk.size != image.size
