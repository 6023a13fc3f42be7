"""One mutated image, read by tapfs in this process and by QEMU's daemon: each difference, and the rule that it has."""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import tapfs
from tapfs.errors import ImageError
from tests.peer.differential.daemon import Daemon, EndedError, QemuError
from tests.peer.differential.mutations import Mutated
from tests.peer.differential.seeds import FORMATS, Seed
from tests.peer.qcow2_damage.checkers import Word, by_qemu, by_tapfs
from tests.peer.qcow2_damage.sound import IMAGE, PASSWORD

SECTOR = 512
#: So much of the start of a disk is read, of its end, and in a piece.
_START, _END, _PIECE = 4 << 20, 1 << 16, 1 << 18
#: Reads of one image, for both sides together, that look for the sectors in which the two differ.
_MOST_READS = 400


class Sort(StrEnum):
    """What two readers differ in."""

    QEMU_REFUSES = "QEMU refuses"
    QEMU_ENDS = "QEMU ends itself"
    TAPFS_REFUSES = "tapfs refuses"
    SIZE = "size"
    QEMU_CANNOT_READ = "QEMU cannot read"
    TAPFS_CANNOT_READ = "tapfs cannot read"
    BYTES = "bytes"
    CHECK = "check"


class Difference(NamedTuple):
    """A difference: what the side said that reads less, and the first sector in which it shows, with its bytes.

    `files` are those of the image, and `size` is that of the disk for tapfs.
    """

    sort: Sort
    said: str
    format: str
    seed: Seed
    files: dict[str, bytes]
    qemu: int
    size: int = 0
    place: int = 0
    ours: bytes = b""
    theirs: bytes = b""

    def __str__(self) -> str:
        where = f" at {self.place:#x}" if self.ours or self.theirs else ""
        return f"{self.sort}{where}: {self.said}"


def differences(name: str, image: Mutated, folder: Path, daemon: Daemon) -> list[Difference]:
    """Write the image into the daemon's folder, and compare what both say of it."""
    for old in folder.iterdir():
        if old.name not in {"nbd", "said"}:
            old.unlink()
    for file, content in image.files.items():
        (folder / file).write_bytes(content)
    return list(_Compared(name, image, folder / IMAGE, daemon).run())


class _Compared:
    """The comparison of one image."""

    def __init__(self, name: str, image: Mutated, path: Path, daemon: Daemon) -> None:
        self._name, self._image, self._path, self._daemon = name, image, path, daemon
        self._reads = 0
        self._size = 0
        self._seen: set[tuple[Sort, str]] = set()

    def run(self) -> Iterator[Difference]:
        seed, shown = self._image.seed, self._path
        if seed.logged:
            shown = self._path.with_name("replayed")
            shown.write_bytes(self._image.files[IMAGE])
        try:
            size: int | None = self._daemon.open(
                shown, FORMATS[self._name], encrypted=seed.encrypted, logged=seed.logged
            )
            refused = None
        except EndedError as error:
            size, refused = None, self._difference(Sort.QEMU_ENDS, str(error))
        except QemuError as error:
            size, refused = None, self._difference(Sort.QEMU_REFUSES, str(error))
        password = PASSWORD if seed.encrypted else None
        try:
            with tapfs.open(self._path, format=self._name, password=password, backing_formats=["raw"]) as disk:
                self._size = disk.size
                if size is None:
                    assert refused is not None
                    # A container is opened without its key at first.
                    if _by_tapfs(disk, 0, min(SECTOR, disk.size))[0] is not None or not seed.encrypted:
                        yield refused._replace(size=disk.size)
                    return
                if size != disk.size:
                    yield self._difference(Sort.SIZE, f"{disk.size} bytes for tapfs, {size} for QEMU")
                yield from self._ranges(disk, min(size, disk.size))
            if self._name == "qcow2":
                yield from self._checks()
        except ImageError as error:
            if size is not None:
                yield self._difference(Sort.TAPFS_REFUSES, f"{error.kind}: {error.message}")

    def _difference(self, sort: Sort, said: str) -> Difference:
        said = (
            said.replace(str(self._path.with_name("replayed")), "IMAGE")
            .replace(str(self._path), "IMAGE")
            .replace(str(self._path.parent), "FOLDER")
        )
        image = self._image
        return Difference(sort, said, self._name, image.seed, image.files, self._daemon.version, self._size)

    def _checks(self) -> Iterator[Difference]:
        """The verdicts of the two checks, where one is clean and the other is not."""
        ours = by_tapfs(self._path)
        theirs = by_qemu(self._path, self._daemon.programs, encrypted=self._image.seed.encrypted)
        if (ours.word is Word.CLEAN) != (theirs.word is Word.CLEAN):
            said = f"tapfs {ours.word}: {ours.said}\nQEMU {theirs.word}: {theirs.said}"
            yield self._difference(Sort.CHECK, said)

    def _ranges(self, disk: tapfs.Image, size: int) -> Iterator[Difference]:
        size = size // SECTOR * SECTOR
        end = min(size, _START)
        starts = [(at, min(at + _PIECE, end)) for at in range(0, end, _PIECE)]
        if size > end:
            starts.append((max(end, size - _END), size))
        for start, stop in starts:
            for each in self._range(disk, start, stop):
                if (each.sort, _general(each.said)) not in self._seen:
                    self._seen.add((each.sort, _general(each.said)))
                    yield each
                if each.sort is Sort.QEMU_ENDS:
                    return

    def _range(self, disk: tapfs.Image, start: int, stop: int) -> Iterator[Difference]:
        """The differences of a range, in sectors as long as the number of reads allows."""
        self._reads += 1
        ours, why = _by_tapfs(disk, start, stop - start)
        try:
            theirs: bytes | None = self._daemon.read(start, stop - start)
            said = ""
        except EndedError as error:
            yield self._difference(Sort.QEMU_ENDS, str(error))
            return
        except QemuError as error:
            theirs, said = None, str(error)
        if ours == theirs is not None:
            return
        if stop - start > SECTOR and self._reads < _MOST_READS:
            middle = start + max(SECTOR, (stop - start) // 2 // SECTOR * SECTOR)
            for part in ((start, middle), (middle, stop)):
                for each in self._range(disk, *part):
                    yield each
                    if each.sort is Sort.QEMU_ENDS:
                        return
            return
        if ours is None and theirs is None:
            return
        if stop - start > SECTOR:
            return  # too many sectors are unlike each other: the first ones have been told of
        sort = Sort.TAPFS_CANNOT_READ if ours is None else Sort.QEMU_CANNOT_READ if theirs is None else Sort.BYTES
        found = self._difference(sort, why if ours is None else said if theirs is None else "other bytes")
        yield found._replace(place=start, ours=ours or b"", theirs=theirs or b"")


def _by_tapfs(disk: tapfs.Image, offset: int, length: int) -> tuple[bytes | None, str]:
    try:
        return disk.read(offset, length), ""
    except ImageError as error:
        return None, f"{error.kind}: {error.message}"


def _general(message: str) -> str:
    return re.sub(r"0x[0-9a-f]+|\d+", "N", message)
