"""Disks of several host files, through the whole of tapfs: found, moved, renamed, missing and closed."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

import tapfs as tapfs_package
from tapfs.errors import ErrorKind, ImageError
from tests.conftest import Ran
from tests.vmdk_images import (
    ZERO,
    cowd,
    descriptor,
    hosted,
    monolithic,
    random_grains,
    read_grains,
    sectors,
    sesparse,
    stream,
    write_list,
)

Run = Callable[..., Ran]
GRAIN = 16 * 512
MIB = 1 << 20


def read(path: Path, **options: object) -> bytes:
    with tapfs_package.open(path, **options) as image:  # type: ignore[arg-type]
        return image.read(0, image.size)


def refused(path: Path, **options: object) -> ImageError:
    with pytest.raises(ImageError) as raised:
        read(path, **options)
    return raised.value


def flat_list(folder: Path, lines: list[str], name: str = "disk.vmdk", **keys: object) -> Path:
    path = folder / name
    path.write_bytes(descriptor(lines, create_type="custom", **keys))  # type: ignore[arg-type]
    return path


def test_a_split_disk(tmp_path: Path) -> None:
    choice = random.Random(1)
    sizes = [3 * MIB, 2 * MIB, 100 * 1024]
    disks = [random_grains(choice, size, GRAIN, zeros=True) for size in sizes]
    parts = [
        ("SPARSE", f"disk-s00{number}.vmdk", hosted(grains, size))
        for number, (grains, size) in enumerate(zip(disks, sizes, strict=True), 1)
    ]
    path = write_list(tmp_path, parts, sizes=sizes, create_type="twoGbMaxExtentSparse")
    expected = b"".join(read_grains(grains, size, GRAIN) for grains, size in zip(disks, sizes, strict=True))
    assert read(path) == expected


def test_grains_of_different_sizes_and_odd_borders(tmp_path: Path) -> None:
    choice = random.Random(2)
    sizes = [MIB + 512, 2 * MIB, 3 * 512]
    disks = [random_grains(choice, size, grain) for size, grain in zip(sizes, (4096, 65536, 4096), strict=True)]
    parts = [
        ("SPARSE", f"{number}.vmdk", hosted(grains, size, grain_sectors=step))
        for number, (grains, size, step) in enumerate(zip(disks, sizes, (8, 128, 8), strict=True))
    ]
    path = write_list(tmp_path, parts, sizes=sizes)
    grains_and_sizes = zip(disks, sizes, (4096, 65536, 4096), strict=True)
    assert read(path) == b"".join(read_grains(*each) for each in grains_and_sizes)


@pytest.mark.parametrize("zeros", [False, True])
def test_esx_disks(tmp_path: Path, zeros: bool) -> None:  # noqa: FBT001  a parameter
    choice = random.Random(3)
    size = 5 * MIB + 1024
    grains = random_grains(choice, size, 512)
    path = write_list(tmp_path, [("VMFSSPARSE", "disk-delta.vmdk", cowd(grains, size))], sizes=[size])
    assert read(path) == read_grains(grains, size, 512)
    size = 40 * MIB
    grains = random_grains(choice, size, 4096, zeros=zeros)
    path = write_list(tmp_path, [("SESPARSE", "disk-sesparse.vmdk", sesparse(grains, size))], sizes=[size])
    assert read(path) == read_grains(grains, size, 4096)


def test_sesparse_over_a_parent(tmp_path: Path) -> None:
    size = 20 * MIB
    noise = random.Random(4).randbytes(size)
    (tmp_path / "base-flat.vmdk").write_bytes(noise)
    flat_list(tmp_path, [f'RW {sectors(size)} VMFS "base-flat.vmdk"'], "base.vmdk", cid=5)
    grains = {0: b"child", 1: ZERO, 100: b"more"}
    content = sesparse(grains, size, unmapped=[2])
    path = write_list(
        tmp_path, [("SESPARSE", "c-sesparse.vmdk", content)], sizes=[size], parent_cid=5, hint="base.vmdk"
    )
    expected = bytearray(read_grains(grains, size, 4096, noise))
    expected[8192:12288] = bytes(4096)  # unmapped: zeros, as the guest sees it
    assert read(path) == expected


@pytest.mark.parametrize(
    ("change", "says", "kind"),
    [
        ({"replay": 1}, "a journal that waits to be replayed", ErrorKind.UNSUPPORTED),
        ((0, b"x"), "holds none", ErrorKind.INVALID_FORMAT),
        ((8, b"\1\0\0\0\3"), "seSparse version", ErrorKind.UNSUPPORTED),
        ((24, b"\x10"), "grains of 16", ErrorKind.UNSUPPORTED),
        ((512, b"x"), "the volatile header", ErrorKind.CORRUPT),
        ((16 * 8, b"\xff\xff\xff\xff\xff\xff\xff\x7f"), "the directory lies at", ErrorKind.OUT_OF_BOUNDS),
        ((20 * 512, b"\1\0\0\0\0\0\0\x20"), "which is no table", ErrorKind.CORRUPT),
        ((20 * 512, b"\xff\xff\0\0\0\0\0\x10"), "outside the area of the tables", ErrorKind.CORRUPT),
        ((21 * 512, b"\0\0\0\0\0\0\0\x40"), "which is no grain", ErrorKind.CORRUPT),
        ((21 * 512, b"\0\0\0\0\0\1\0\x30"), "which is no grain", ErrorKind.CORRUPT),
    ],
)
def test_hostile_sesparse(tmp_path: Path, change: object, says: str, kind: ErrorKind) -> None:
    size = 20 * MIB
    keys = change if isinstance(change, dict) else {}
    content = bytearray(sesparse({0: b"x"}, size, **keys))
    if isinstance(change, tuple):
        content[change[0] : change[0] + len(change[1])] = change[1]
    path = write_list(tmp_path, [("SESPARSE", "x.vmdk", bytes(content))], sizes=[size])
    error = refused(path)
    assert says in str(error)
    assert error.kind is kind
    assert error.path == str(tmp_path / "x.vmdk")


@pytest.mark.parametrize(
    ("at", "value", "says"),
    [
        (4, b"\2", "COWD version 2"),
        (16, b"\3", "grain of 3 sectors"),
        (20, b"\1", "inside the header"),
        (24, b"\0", "the directory has 0 entries"),
        (4 * 512, b"\1\0\0\0", "grain table at 0x200 inside the header"),
        (4 * 512, b"\0\0\0\1", "past the end of the file"),
        (5 * 512, b"\1\0\0\0", "grain at 0x200 inside the header"),
        (5 * 512, b"\0\0\0\1", "past the end of the file"),
    ],
)
def test_hostile_cowd(tmp_path: Path, at: int, value: bytes, says: str) -> None:
    content = bytearray(cowd({0: b"x"}, MIB))
    content[at : at + len(value)] = value
    path = write_list(tmp_path, [("VMFSSPARSE", "x.vmdk", bytes(content))], sizes=[MIB])
    assert says in str(refused(path))


def test_flat_extents_with_offsets_zeros_and_one_file_twice(tmp_path: Path) -> None:
    noise = random.Random(5).randbytes(10 * 512)
    (tmp_path / "a.bin").write_bytes(noise)
    lines = ['RW 3 FLAT "a.bin" 2', "RW 5 ZERO", 'RDONLY 2 FLAT "a.bin" 8', "RW 0 ZERO", 'RW 1 FLAT "b.bin"']
    (tmp_path / "b.bin").write_bytes(b"b" * 513)
    path = flat_list(tmp_path, [lines[0], lines[1], lines[4], lines[3]])
    assert read(path) == noise[1024:2560] + bytes(2560) + b"b" * 512
    path = flat_list(tmp_path, [lines[1], lines[2], lines[3]])
    assert read(path) == bytes(2560) + noise[4096:]


def test_one_flat_extent_is_the_disk_itself(tmp_path: Path, tapfs: Run) -> None:
    noise = random.Random(6).randbytes(MIB)
    (tmp_path / "disk-flat.vmdk").write_bytes(bytes(512) + noise)
    path = flat_list(tmp_path, [f'RW {sectors(MIB)} FLAT "disk-flat.vmdk" 1'])
    with tapfs_package.open(path) as image:
        assert image.layers[0].driver.geometry.identity == (1, 512)
        assert image.read(0, MIB) == noise
    (tmp_path / "raw").write_bytes(noise)
    assert tapfs("compare", path, tmp_path / "raw").code == 0


def test_the_kernel_may_read_a_flat_file_by_itself_and_not_write_it(tmp_path: Path) -> None:
    """Whoever writes a VMDK changes its content ID first, and the kernel does not."""
    (tmp_path / "disk-flat.vmdk").write_bytes(b"f" * MIB)
    path = flat_list(tmp_path, [f'RW {sectors(MIB)} FLAT "disk-flat.vmdk"'])
    with tapfs_package.open(path) as image:
        descriptor_of_file = image.whole_file()
        assert descriptor_of_file is not None
        assert os.pread(descriptor_of_file, 4, MIB - 4) == b"ffff"
    with tapfs_package.open(path, writable=True) as image:
        assert image.whole_file() is None
    path = flat_list(tmp_path, [f'RW {sectors(MIB) - 1} FLAT "disk-flat.vmdk" 1'])
    with tapfs_package.open(path) as image:
        assert image.whole_file() is None


def test_holes_of_flat_files_cost_nothing(tmp_path: Path, tapfs: Run) -> None:
    for name in ("a", "b"):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, 1 << 40)
    path = flat_list(tmp_path, [f'RW {1 << 31} FLAT "a"', f'RW {1 << 31} FLAT "b"'])
    ran = tapfs("map", "--json", path)
    assert ran.code == 0
    assert '"data": true' not in ran.out


def test_noaccess_is_an_error_and_not_zeros(tmp_path: Path, tapfs: Run) -> None:
    (tmp_path / "a.bin").write_bytes(b"a" * 512)
    path = flat_list(tmp_path, ['RW 1 FLAT "a.bin"', 'NOACCESS 3 FLAT "secret.bin"'])
    error = refused(path)
    assert error.kind is ErrorKind.DENIED
    assert "bytes 512 to 2048 of the disk may not be read" in str(error)
    assert tapfs("info", path).code == 0
    with tapfs_package.open(path) as image:
        assert image.read(0, 512) == b"a" * 512
    assert tapfs("convert", "-O", "raw", path, tmp_path / "raw").code == 19
    assert not (tmp_path / "raw").exists()


@pytest.mark.parametrize("lines", [["NOACCESS 3 ZERO"], ['RDONLY 1 FLAT "a.bin"', "RW 2 ZERO"]])
def test_lists_without_a_writable_extent(tmp_path: Path, lines: list[str]) -> None:
    (tmp_path / "a.bin").write_bytes(b"a" * 512)
    assert read(flat_list(tmp_path, lines)) == (b"a" * 512 + bytes(1024) if len(lines) == 2 else bytes(1536))


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "disk-flat.vmdk",
        "/vmfs/volumes/4c1b-8d/vm/disk-flat.vmdk",
        r"C:\VMs\win\disk-flat.vmdk",
        "../elsewhere/disk-flat.vmdk",
        "old-flat.vmdk",
        "[datastore1] vm/disk-flat.vmdk",
    ],
)
def test_moved_and_renamed_extents_are_found_beside_the_descriptor(tmp_path: Path, name: str) -> None:
    (tmp_path / "disk-flat.vmdk").write_bytes(b"d" * 512)
    assert read(flat_list(tmp_path, [f'RW 1 FLAT "{name}"'])) == b"d" * 512


def test_the_flat_file_of_another_disk_is_not_taken_for_one_on_a_datastore(tmp_path: Path) -> None:
    """A copy may be called `[copy] disk.vmdk`: what its descriptor names so is a file, and on no datastore."""
    (tmp_path / "disk-flat.vmdk").write_bytes(b"o" * 512)
    line = 'RW 1 FLAT "[copy] disk-flat.vmdk"'
    path = flat_list(tmp_path, [line], "[copy] disk.vmdk")
    assert refused(path, writable=True).kind is ErrorKind.NOT_FOUND
    assert read(flat_list(tmp_path, [line])) == b"o" * 512
    (tmp_path / "[copy] disk-flat.vmdk").write_bytes(b"c" * 512)
    assert read(path) == b"c" * 512


def test_a_missing_extent_is_named_with_all_places(tmp_path: Path) -> None:
    path = flat_list(tmp_path, ['RW 1 FLAT "/vmfs/old-flat.vmdk"'], "new.vmdk")
    error = refused(path)
    assert error.kind is ErrorKind.DENIED
    assert error.path == str(path)
    message = str(error)
    assert "its extent /vmfs/old-flat.vmdk lies outside the folder of the image" in message
    assert "there is no old-flat.vmdk or new-flat.vmdk beside the descriptor" in message
    error = refused(flat_list(tmp_path, ['RW 1 FLAT "old-flat.vmdk"'], "new.vmdk"))
    assert error.kind is ErrorKind.NOT_FOUND
    assert "its extent old-flat.vmdk is missing, and there is no new-flat.vmdk beside the descriptor" in str(error)


@pytest.mark.parametrize("name", ["../secret", "{above}/secret", "link"])
def test_names_obey_the_gate(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(b"s" * 512)
    (folder / "link").symlink_to(tmp_path / "secret")
    path = flat_list(folder, [f'RW 1 FLAT "{name.format(above=tmp_path)}"'])
    assert refused(path).kind is ErrorKind.DENIED
    assert read(path, gate=tapfs_package.Gate.inside(tmp_path)) == b"s" * 512


def test_devices_are_refused(tmp_path: Path) -> None:
    assert refused(flat_list(tmp_path, ['RW 1 FLAT "/dev/sda"'])).kind is ErrorKind.DENIED
    for kind, what in (("VMFSRDM", "a device"), ("VMFSPASSTHROUGHRAWDEVICEMAP", "a device"), ("VSANSPARSE", "vSAN")):
        error = refused(flat_list(tmp_path, [f'RW 1 {kind} "disk-rdm.vmdk"']))
        assert f"an extent of the type {kind}, which is" in str(error)
        assert what in str(error)
        assert error.kind is ErrorKind.UNSUPPORTED


@pytest.mark.parametrize(
    ("name", "what", "beside"),
    [
        ("/dev/sdb", "a device of the machine that made the image", "sdb"),
        (r"\\.\PhysicalDrive2", "a device of the machine that made the image", "PhysicalDrive2"),
        ("vsan://6e2f-01", "an object of a vSAN datastore", "6e2f-01"),
    ],
)
def test_a_device_as_an_extent_is_named_and_its_copy_is_taken(
    tmp_path: Path, name: str, what: str, beside: str
) -> None:
    path = flat_list(tmp_path, [f'RW 1 FLAT "{name}" 0'])
    error = refused(path)
    assert f"its extent {name} is {what}, and there is no file {beside} beside the descriptor" in str(error)
    (tmp_path / beside).write_bytes(b"d" * 512)
    assert read(path) == b"d" * 512


def test_a_device_of_this_host_has_the_remedy_that_opens_it(tmp_path: Path) -> None:
    remedy = refused(flat_list(tmp_path, ['RW 1 FLAT "/dev/loop0" 0'])).remedy
    assert remedy is not None
    assert remedy.startswith("copy what it holds into a file loop0 beside the descriptor; on the machine that made the")
    assert "name a folder that holds both" in remedy


def test_a_file_in_shared_memory_is_no_device(tmp_path: Path) -> None:
    error = refused(flat_list(tmp_path, ['RW 1 FLAT "/dev/shm/foo-flat.vmdk" 0']))
    assert "its extent /dev/shm/foo-flat.vmdk lies outside the folder of the image" in str(error)
    assert "device" not in str(error)


def test_a_descriptor_with_keys_only_is_no_raw_disk(tmp_path: Path, tapfs: Run) -> None:
    """ESX, VMware and QEMU need no first line: taken for a raw disk, its text would be what is converted."""
    path = flat_list(tmp_path, ['RW 1 FLAT "disk-flat.vmdk"'])
    (tmp_path / "disk-flat.vmdk").write_bytes(b"d" * 512)
    path.write_bytes(path.read_bytes().partition(b"\n")[2])
    assert "format:         vmdk" in tapfs("info", path).out
    assert read(path) == b"d" * 512


def test_what_kiwi_writes_before_the_first_line(tmp_path: Path, tapfs: Run) -> None:
    """It has `encoding` in front of the embedded text, and its keys end without a line end."""
    grains = random_grains(random.Random(3), MIB, GRAIN)
    text = b'encoding="UTF-8"\n' + descriptor([f'RW {sectors(MIB)} SPARSE "kiwi.vmdk"']) + b'ddb.toolsVersion = "9350"'
    path = tmp_path / "kiwi.vmdk"
    path.write_bytes(hosted(grains, MIB, text))
    assert read(path) == read_grains(grains, MIB, GRAIN)
    assert tapfs("check", path).code == 0
    with tapfs_package.open(path, writable=True) as image:
        image.write(0, b"new")
    assert path.read_bytes()[512:].startswith(b'encoding="UTF-8"\n# Disk DescriptorFile\nversion=1\nCID=')
    assert read(path)[:3] == b"new"


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (['RW 4 FLAT "disk.vmdk"'], "names itself"),
        (['RW 4 SPARSE "disk.vmdk"'], "names itself"),
        (['RW 4 SPARSE "s.vmdk"', 'RW 4 SPARSE "s.vmdk"'], "names the sparse extent s.vmdk twice"),
        (['RW 4 FLAT "short"'], "the file short is truncated: its extent in the descriptor needs 2048 bytes"),
        (['RW 4 FLAT "short" 9'], "is truncated"),
        (['RW 4 MAGIC "short"'], "the unknown type MAGIC"),
        (["RW 4 FLAT"], "without a file"),
        (['RW 4 SPARSE "short"'], "holds none"),
        (['RW 4096 SPARSE "s.vmdk"'], "its line in the descriptor 2097152"),
    ],
)
def test_descriptors_that_cannot_be_true(tmp_path: Path, lines: list[str], says: str) -> None:
    (tmp_path / "short").write_bytes(b"s" * 1000)
    (tmp_path / "s.vmdk").write_bytes(hosted({}, MIB))
    assert says in str(refused(flat_list(tmp_path, lines)))


def test_a_parent_that_nothing_calls_a_vmdk_opens_no_extents(tmp_path: Path, tapfs: Run) -> None:
    """A guest can write a descriptor into its raw disk, and would read the disks beside it through an overlay."""
    (tmp_path / "secret.raw").write_bytes(b"s" * MIB)
    flat_list(tmp_path, [f'RW {sectors(MIB)} FLAT "secret.raw"'], "guest.raw")
    overlay = tmp_path / "overlay.qcow"
    assert tapfs("create", "-f", "qcow", "-b", tmp_path / "guest.raw", "-F", "raw", overlay, "1M").code == 0
    error = refused(overlay)
    assert error.kind is ErrorKind.DENIED
    assert "looks like vmdk and names a further file" in str(error)
    assert read(overlay, backing_formats=["raw"])[:21] == b"# Disk DescriptorFile"
    assert read(overlay, backing_formats=["vmdk"])[:1] == b"s"


# -- parents ---------------------------------------------------------------------------------------


def test_a_delta_over_a_delta(tmp_path: Path) -> None:
    choice = random.Random(8)
    disks = [random_grains(choice, 3 * MIB, GRAIN) for _ in range(3)]
    expected = b""
    for number, grains in enumerate(disks):
        keys = {"parent_cid": number, "hint": f"{number - 1}.vmdk"} if number else {}
        content = monolithic(grains, 3 * MIB, cid=number + 1, **keys)
        (tmp_path / f"{number}.vmdk").write_bytes(content)
        expected = read_grains(grains, 3 * MIB, GRAIN, expected)
    assert read(tmp_path / "2.vmdk") == expected


@pytest.mark.parametrize(
    "hint", ["base.vmdk", "/vmfs/volumes/1/vm/base.vmdk", r"D:\vm\base.vmdk", "[ds1] vm/base.vmdk", "[ds1] base.vmdk"]
)
def test_a_moved_parent_is_found_beside_its_child(tmp_path: Path, hint: str) -> None:
    (tmp_path / "base.vmdk").write_bytes(monolithic({0: b"base"}, MIB, cid=9))
    (tmp_path / "child.vmdk").write_bytes(monolithic({}, MIB, parent_cid=9, hint=hint))
    assert read(tmp_path / "child.vmdk")[:4] == b"base"


def test_another_parent_is_refused_unless_forced(tmp_path: Path, tapfs: Run) -> None:
    (tmp_path / "base.vmdk").write_bytes(monolithic({0: b"base"}, MIB, cid=10))
    child = tmp_path / "child.vmdk"
    child.write_bytes(monolithic({}, MIB, parent_cid=9, hint="base.vmdk"))
    error = refused(child)
    assert error.kind is ErrorKind.CORRUPT
    assert "cid:00000009" in str(error)
    assert read(child, any_parent=True)[:4] == b"base"
    assert tapfs("map", "--any-parent", child).code == 0


def test_a_missing_parent_is_an_error_and_never_zeros(tmp_path: Path) -> None:
    (tmp_path / "child.vmdk").write_bytes(monolithic({}, MIB, parent_cid=9, hint="base.vmdk"))
    assert refused(tmp_path / "child.vmdk").kind is ErrorKind.NOT_FOUND


# -- streams through the engine --------------------------------------------------------------------


@pytest.mark.parametrize("keys", [{}, {"footer": False}, {"footer": False, "markers": False}, {"short_last": True}])
def test_streams_through_the_engine(tmp_path: Path, keys: dict[str, bool]) -> None:
    size = 40 * 65536 + 3584
    grains = random_grains(random.Random(9), size, 65536)
    grains[40] = b"the last" * 400
    path = tmp_path / "s.vmdk"
    path.write_bytes(stream(grains, size, **keys))
    assert read(path) == read_grains(grains, size, 65536)
