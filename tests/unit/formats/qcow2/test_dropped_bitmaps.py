"""Bitmaps of a qcow2 image that cannot be true: a repair drops them where the user gives them up, and nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

import tapfs
from tapfs.driver import OpenRequest
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Range
from tapfs.formats.qcow2 import FORMAT
from tapfs.plan import Plan
from tapfs.testing.model import MemoryFile, read_extents
from tests.conftest import Ran
from tests.peer.qcow2_damage.anatomy import Anatomy
from tests.peer.qcow2_damage.damages import DAMAGES
from tests.peer.qcow2_damage.sound import IMAGE, KINDS, sound
from tests.peer.test_convert import qemu

Run = Callable[..., Ran]

#: Damages of one of two bitmaps, of the directory that lists both, and of one that takes both with it.
OF_ONE = (
    "bitmap: another type",
    "bitmap: flags that are reserved",
    "bitmap: a far longer table",
    "bitmap's table: bit 8",
)
OF_DIRECTORY = ("bitmap directory: reserved bits", "bitmap directory: longer")
OF_ALL = (
    "bitmap directory: much longer",
    "bitmap directory: one more",
    "bitmap: a long name",
    "bitmap: a granularity that is too large",
)


def damaged(damage: str) -> bytes:
    anatomy = Anatomy(bytearray(sound("4096")[IMAGE]))
    assert DAMAGES[damage](anatomy, random.Random(damage))
    return bytes(anatomy.data)


def plans(file: MemoryFile) -> list[Plan]:
    return list(FORMAT.open(file, OpenRequest(lenient=True)).repair_dropping_bitmaps())


def disk(file: MemoryFile) -> bytes:
    return read_extents(FORMAT.open(file, OpenRequest(lenient=True)), file, 0, KINDS["4096"].size)


@pytest.mark.parametrize("damage", [*OF_ONE, *OF_DIRECTORY, *OF_ALL])
def test_what_cannot_be_true_is_dropped_and_qemu_opens_the_image(tmp_path: Path, damage: str) -> None:
    image = tmp_path / "image"
    image.write_bytes(damaged(damage))
    marked = {name: marks(tmp_path / "sound", name) for name in names(tmp_path)}
    with tapfs.open(image, format="qcow2") as opened:
        before = opened.read(0, opened.size)

    assert tapfs.repair(image, format="qcow2").corruptions > 0
    with pytest.raises(AssertionError):
        qemu("qemu-img", "info", "-f", "qcow2", image)

    report = tapfs.repair(image, format="qcow2", drop_bitmaps=True)
    assert (report.corruptions, report.leaks) == (0, 0), report.findings
    qemu("qemu-img", "check", "-f", "qcow2", image)
    left = {each.name for each in tapfs.bitmaps(image)}
    lost = marked.keys() - left
    assert len(lost) == (1 if damage in OF_ONE else 0 if damage in OF_DIRECTORY else 2)
    for name in left:
        assert marks(image, name) == marked[name]
    (said,) = (each for each in report.mended if "bitmap" in each)
    assert damage in OF_ALL or all(name in said for name in lost)
    assert not lost or "a backup by it has to be a full one" in said
    with tapfs.open(image, format="qcow2") as opened:
        assert opened.read(0, opened.size) == before


def marks(image: Path, name: str) -> list[Range]:
    with tapfs.read_bitmap(image, name) as found:
        return list(found.ranges)


def names(folder: Path) -> list[str]:
    (folder / "sound").write_bytes(sound("4096")[IMAGE])
    return [each.name for each in tapfs.bitmaps(folder / "sound")]


@pytest.mark.parametrize("damage", [OF_ONE[0], OF_DIRECTORY[1], OF_ALL[0]])
def test_a_crash_in_a_repair_leaves_the_disk_as_it_was(damage: str) -> None:
    raw = damaged(damage)
    expected, made = disk(MemoryFile(raw)), plans(MemoryFile(raw))
    stages = [stage for plan in made for stage in plan.stages]
    before = FORMAT.open(MemoryFile(raw), OpenRequest(lenient=True)).check().corruptions
    for end in range(len(stages) + 1):
        file = MemoryFile(raw)
        file.apply_all([Plan(tuple(stages[:end]))])
        assert disk(file) == expected
        assert FORMAT.open(file, OpenRequest(lenient=True)).check().corruptions <= before
        file.apply_all(plans(file))
        assert FORMAT.open(file, OpenRequest(lenient=True)).check().corruptions == 0


def test_sound_bitmaps_are_kept() -> None:
    assert plans(MemoryFile(sound("4096")[IMAGE])) == []


def test_the_command_asks_for_consent(tapfs: Run, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(damaged(OF_ONE[0]))
    code, out, _ = tapfs("repair", image)
    assert code == 2
    assert "tapfs repair --drop-bitmaps gives up" in out
    code, out, _ = tapfs("repair", "--dry-run", "--drop-bitmaps", image)
    assert "would mend: bitmap bitmap" in out
    code, out, _ = tapfs("repair", "--drop-bitmaps", image)
    assert code == 0
    assert "mended: bitmap bitmap" in out


def test_a_format_without_bitmaps_says_so(tmp_path: Path) -> None:
    tapfs.create(tmp_path / "a", "vdi", 1 << 20)
    with pytest.raises(ImageError, match="a vdi image has no bitmaps") as caught:
        tapfs.repair(tmp_path / "a", format="vdi", drop_bitmaps=True)
    assert caught.value.kind is ErrorKind.UNSUPPORTED
