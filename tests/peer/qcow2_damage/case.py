"""One damaged image: judged by both checkers, repaired by tapfs, judged again, and read before and after."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import tapfs
from tapfs.errors import ImageError
from tests.peer.qcow2_damage.anatomy import Anatomy
from tests.peer.qcow2_damage.checkers import Verdict, Word, by_qemu, by_tapfs
from tests.peer.qcow2_damage.damages import DAMAGES
from tests.peer.qcow2_damage.disagreements import known
from tests.peer.qcow2_damage.sound import IMAGE, KINDS, PASSWORD, sound

SECTOR = 512


class Case(NamedTuple):
    """A kind of image, a damage, and the seed of what that chooses."""

    kind: str
    damage: str
    seed: int = 1

    def __str__(self) -> str:
        return f"--kind '{self.kind}' --damage '{self.damage}' --first-seed {self.seed}"


def damaged(case: Case) -> bytes | None:
    """The image, or None where it has nothing that could be damaged so."""
    anatomy = Anatomy(bytearray(sound(case.kind)[IMAGE]))
    if not DAMAGES[case.damage](anatomy, random.Random(str(case))):
        return None
    return bytes(anatomy.data)


def disks(kind: str) -> Sequence[str | None]:
    """The disks of an image: the current one, and those of its snapshots by their names."""
    return None, *(f"snapshot{number}" for number in range(KINDS[kind].snapshots))


class Read(NamedTuple):
    """The bytes of a disk, and the numbers of the sectors that could not be read."""

    data: bytes
    unread: frozenset[int]

    def is_right(self, sector: int, sound_data: bytes) -> bool:
        """Whether a sector is read as it was before the damage."""
        place = slice(sector * SECTOR, (sector + 1) * SECTOR)
        return sector not in self.unread and self.data[place] == sound_data[place] and len(self.data) > place.start

    def lost(self, before: Read, sound_data: bytes) -> int | None:
        """The first place that was read rightly before, and is not now."""
        if self == before or (self.data == sound_data and not self.unread):
            return None
        sectors = range(-(-len(sound_data) // SECTOR))
        wrong = (each for each in sectors if before.is_right(each, sound_data) and not self.is_right(each, sound_data))
        return next((each * SECTOR for each in wrong), None)


def read(kind: str, image: Path, snapshot: str | None) -> Read:
    """Read a disk as far as it can be read."""
    password = PASSWORD if KINDS[kind].encrypted else None
    unread: set[int] = set()
    try:
        with tapfs.open(image, format="qcow2", password=password, snapshot=snapshot) as disk:
            data = bytearray(min(disk.size, KINDS[kind].size))
            _read(disk, 0, len(data), data, unread)
    except ImageError:
        return Read(b"", frozenset())
    return Read(bytes(data), frozenset(unread))


def _read(disk: tapfs.Image, start: int, stop: int, data: bytearray, unread: set[int]) -> None:
    try:
        data[start:stop] = disk.read(start, stop - start)
    except ImageError:
        if stop - start <= SECTOR:
            unread.add(start // SECTOR)
            return
        middle = start + max(SECTOR, (stop - start) // 2 // SECTOR * SECTOR)
        _read(disk, start, middle, data, unread)
        if middle < stop:
            _read(disk, middle, stop, data, unread)


@cache
def _sound_disk(kind: str, snapshot: str | None) -> bytes:
    with TemporaryDirectory(prefix="tapfs-damage-") as folder:
        for name, content in sound(kind).items():
            (Path(folder) / name).write_bytes(content)
        return read(kind, Path(folder) / IMAGE, snapshot).data


class Outcome(NamedTuple):
    """What came of a case: whether the checkers disagreed as it is written down, and whether all was mended."""

    disagreed: bool
    mended: bool


def judge(case: Case, image: bytes, folder: Path, programs: Path | None, *, repairs: bool = True) -> Outcome:
    """Compare the checkers, and look at a repair. Raises AssertionError where something is not as it should be."""
    for name, content in sound(case.kind).items():
        (folder / name).write_bytes(content)
    path = folder / IMAGE
    path.write_bytes(image)
    ours, theirs = _compared(case, path, programs, "")
    if not repairs:
        return Outcome(ours.counts != theirs.counts, mended=False)
    before = {snapshot: read(case.kind, path, snapshot) for snapshot in disks(case.kind)}
    try:
        tapfs.repair(path, format="qcow2")
    except ImageError as error:
        if ours.word not in {Word.REFUSED, Word.CORRUPT}:
            raise AssertionError(f"a repair says: {error}") from error
    left, _ = _compared(case, path, programs, "after the repair: ")
    for snapshot, seen in before.items():
        lost = read(case.kind, path, snapshot).lost(seen, _sound_disk(case.kind, snapshot))
        assert lost is None, f"after the repair {snapshot or 'the disk'} reads otherwise at {lost:#x}"
    return Outcome(ours.counts != theirs.counts, left.word is Word.CLEAN)


def _compared(case: Case, path: Path, programs: Path | None, when: str) -> tuple[Verdict, Verdict]:
    ours = by_tapfs(path)
    theirs = by_qemu(path, programs, encrypted=KINDS[case.kind].encrypted)
    if ours.counts != theirs.counts:
        written = known(case.kind, case.damage, ours, theirs)
        said = f"{when}tapfs: {ours.counts}\n{ours.said}\nqemu-img: {theirs.counts}\n{theirs.said}"
        assert written is not None, f"{when}a disagreement that is not written down\n{said}"
    return ours, theirs
