"""Writing VMDKs: the marks of an open disk, both directories, and what is not written."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

import tapfs as tapfs_package
from tapfs.driver import OpenRequest
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.vmdk import FORMAT
from tapfs.formats.vmdk.descriptor import parse_descriptor
from tapfs.plan import Write
from tapfs.testing.model import MemoryFile
from tests.conftest import Ran
from tests.vmdk_images import cowd, descriptor, hosted, monolithic, sectors, sesparse, stream, write_list

Run = Callable[..., Ran]
MIB = 1 << 20
GRAIN = 16 * 512


def writable(content: bytes):  # noqa: ANN201  see FORMAT
    return FORMAT.open(MemoryFile(content), OpenRequest(writable=True))


def steps(plan: object) -> list[Write]:
    return [step for stage in plan.stages for step in stage]  # type: ignore[attr-defined]


def test_the_begin_changes_the_content_id_once_and_marks_the_extent() -> None:
    uuid = 'ddb.uuid.modification="00000000-0000-0000-0000-000000000000"'
    content = monolithic({}, MIB, more='changeTrackPath="disk-ctk.vmdk"\nddb.longContentID="' + 32 * "0" + '"\n' + uuid)
    driver = writable(content)
    assert driver.identities == {"cid:12345678"}
    file = MemoryFile(content)
    file.apply(driver.begin())
    (identity,) = driver.identities
    said = parse_descriptor(bytes(file.data[512 : 21 * 512]), "x")
    assert identity == f"cid:{said.cid:08x}" != "cid:12345678"
    assert said.value("ddb.longcontentid").endswith(f"{said.cid:08x}")
    assert "changetrackpath" not in said.values
    assert said.value("ddb.uuid.modification")[14] == "4"  # a random UUID, which VirtualBox compares
    assert file.data[72] == 1
    assert len(file.data) == len(content)
    assert steps(driver.begin()) == steps(driver.begin())
    file.apply(driver.end())
    assert file.data[72] == 0


def test_an_extent_that_a_crash_left_open_stays_open() -> None:
    driver = writable(monolithic({}, MIB, unclean=1))
    assert not any(step.host_offset == 72 for step in steps(driver.begin()))
    assert not driver.end()


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (['RDONLY 8 FLAT "f"'], "has no extent that may be written"),
        (['RW 8 FLAT "f" 0', 'RW 8 FLAT "f" 4'], "are the same bytes of one file"),
        (['RW 2048 SPARSE "s"', 'RW 2048 SPARSE "t"'], "its extents have different grains"),
        (['RW 7 FLAT "f"', 'RW 2048 SPARSE "s"'], "do not begin on whole grains"),
        (['RW 2048 SESPARSE "e"'], "VMware has not published"),
        (['RW 2048 SPARSE "p"'], "a streamOptimized disk is written once"),
    ],
)
def test_disks_that_are_only_read(tmp_path: Path, lines: list[str], says: str) -> None:
    (tmp_path / "f").write_bytes(bytes(MIB))
    (tmp_path / "s").write_bytes(hosted({}, MIB))
    (tmp_path / "t").write_bytes(hosted({}, MIB, grain_sectors=32))
    (tmp_path / "e").write_bytes(sesparse({}, MIB))
    (tmp_path / "p").write_bytes(stream({}, MIB, text=False))
    path = tmp_path / "disk.vmdk"
    path.write_bytes(descriptor(lines))
    with pytest.raises(ImageError) as raised:
        tapfs_package.open(path, writable=True)
    assert raised.value.kind is ErrorKind.READ_ONLY
    assert says in str(raised.value)
    with tapfs_package.open(path) as image:
        assert image.size > 0


def test_a_read_only_extent_beside_a_writable_one(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a" * 4096)
    (tmp_path / "b").write_bytes(b"b" * 4096)
    path = tmp_path / "disk.vmdk"
    path.write_bytes(descriptor(['RDONLY 8 FLAT "a"', 'RW 8 FLAT "b"', "RW 8 ZERO"]))
    with tapfs_package.open(path, writable=True) as image:
        image.write(4096, b"new")
        image.write_zeroes(8192, 4096)  # it reads so already
        for at in (0, 8192):
            with pytest.raises(ImageError) as raised:
                image.write(at, b"x")
            assert raised.value.kind is ErrorKind.READ_ONLY
        with pytest.raises(ImageError):
            image.write_zeroes(0, 4096)
    assert (tmp_path / "a").read_bytes() == b"a" * 4096
    assert (tmp_path / "b").read_bytes() == b"new" + b"b" * 4093


def test_a_flat_extent_behind_sparse_ones_is_zeroed_no_further_than_its_end(tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(hosted({}, MIB))
    (tmp_path / "f").write_bytes(b"f" * 5000)
    path = tmp_path / "disk.vmdk"
    path.write_bytes(descriptor([f'RW {sectors(MIB)} SPARSE "s"', 'RW 3 FLAT "f" 1']))
    with tapfs_package.open(path, writable=True) as image:
        image.write_zeroes(0, image.size)
        image.discard(0, image.size)
    assert (tmp_path / "f").read_bytes() == b"f" * 512 + bytes(1536) + b"f" * (5000 - 2048)


def test_damaged_primary_tables_are_not_written(tmp_path: Path, tapfs: Run) -> None:
    noise = random.Random(1).randbytes(GRAIN)
    content = bytearray(monolithic({0: noise, 7: noise}, MIB))
    directory = int.from_bytes(content[56:64], "little") * 512
    content[directory : directory + 4] = bytes(4)
    path = tmp_path / "disk.vmdk"
    path.write_bytes(content)
    assert tapfs("check", path).code == 2
    with pytest.raises(ImageError) as raised:
        tapfs_package.open(path, writable=True)
    assert "run tapfs repair" in (raised.value.remedy or "")
    ran = tapfs("repair", path)
    assert ran.code == 0
    assert "grain table 0" in ran.out
    assert tapfs("check", path).code == 0
    with tapfs_package.open(path, writable=True) as image:
        image.write(GRAIN, b"x")
        assert image.read(0, 2 * GRAIN) == noise + b"x" + bytes(GRAIN - 1)


def test_a_cowd_says_where_the_next_grain_goes(tmp_path: Path, tapfs: Run) -> None:
    path = write_list(tmp_path, [("VMFSSPARSE", "d", cowd({3: b"x"}, MIB))], sizes=[MIB])
    with tapfs_package.open(path, writable=True) as image:
        image.write(100_000, b"more" * 1000)
    content = (tmp_path / "d").read_bytes()
    assert int.from_bytes(content[28:32], "little") * 512 == len(content)
    assert content[1648:1652] == bytes(4)
    assert tapfs("check", path).code == 0


def test_a_kill_leaves_the_mark(tmp_path: Path, tapfs: Run) -> None:
    path = tmp_path / "disk.vmdk"
    path.write_bytes(monolithic({}, MIB))
    image = tapfs_package.open(path, writable=True)
    image.write(0, b"x")
    image.flush()
    image.abandon()
    assert path.read_bytes()[72] == 1
    ran = tapfs("check", path)
    assert ran.code == 0
    assert "was not closed" in ran.out
    assert tapfs("repair", path).code == 0
    assert path.read_bytes()[72] == 0
