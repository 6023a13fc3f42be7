"""The contents of a package as its readers see them, and what they find: disks, each with its place."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise

from tapfs.errors import ErrorKind, ImageError
from tapfs.records import NamedTuple, dataclass, field

#: Reads up to so many bytes at an offset of the package's file.
Read = Callable[[int, int], bytes]

#: The operation (`ImageError.op`) of an error about a package.
OPERATION = "read the package"

#: Descriptors are not longer.
MOST_DESCRIPTOR_BYTES = 16 << 20
#: A package has no more disks.
MOST_DISKS = 1024


class Place(NamedTuple):
    """A run of bytes of the package's file."""

    offset: int
    length: int


class NumberedPlaces:
    """The places of numbered members, 24 bytes each: a disk may be in millions of them."""

    def __init__(self) -> None:
        self.numbers = array("Q")
        self.offsets = array("Q")
        self.lengths = array("Q")

    def add(self, number: int, place: Place) -> None:
        """Add one, in any order."""
        self.numbers.append(number)
        self.offsets.append(place.offset)
        self.lengths.append(place.length)

    def sort(self) -> int | None:
        """Have the numbers ascend; a number that is there twice, if one is."""
        numbers = self.numbers
        if any(left >= right for left, right in pairwise(numbers)):
            order = sorted(range(len(numbers)), key=numbers.__getitem__)
            for name in ("numbers", "offsets", "lengths"):
                old = getattr(self, name)
                setattr(self, name, array("Q", (old[index] for index in order)))
        return next((left for left, right in pairwise(self.numbers) if left == right), None)

    def __iter__(self) -> Iterator[tuple[int, Place]]:
        for number, offset, length in zip(self.numbers, self.offsets, self.lengths, strict=True):
            yield number, Place(offset, length)


class Chunks(NamedTuple):
    """A disk of `virtual_size` bytes in chunks of one length; what no chunk holds is zeros.

    `places` are those of the chunks, by ascending numbers. `checksums` are those of the members that hold their
    checksums, by the name of the algorithm.
    """

    virtual_size: int
    chunk_bytes: int
    places: NumberedPlaces
    checksums: Mapping[str, NumberedPlaces]


@dataclass(frozen=True, slots=True)
class PackagedDisk:
    """One disk of a package: its number from 1 on, and the `name` that its package gives to its file.

    `format` is what the package says of it, None where it says nothing. The disk lies in the `files`, one behind the
    other, which are names beside the package's file, or members of it. `gzip`: they hold it packed. `chunks` stand
    in place of files. `size` is the disk's in bytes where the package says it. `folders` are those where parents of
    the file lie. `parent` is the number of the disk over which this one lies, where the package says that.
    """

    number: int
    name: str
    format: str | None = None
    files: tuple[str, ...] = ()
    gzip: bool = False
    chunks: Chunks | None = None
    size: int | None = None
    folders: tuple[str, ...] = ()
    parent: int | None = None


class Digest(NamedTuple):
    """What a manifest says of a file: the hash of that name has this value, in lower-case hexadecimal digits."""

    file: str
    algorithm: str
    value: str


@dataclass(frozen=True, slots=True)
class Package:
    """A package: its `kind` (ova, ovf, vmx, vbox, xva, box), its disks, its manifest.

    `members` are the places of files that it holds itself, by their names; None: its files lie beside it. Of a member
    whose place is None the archive has no bytes as they are: it is a link, or sparse.
    `manifests` are the names of files that may hold digests. `notes` say what was left out.
    """

    kind: str
    disks: tuple[PackagedDisk, ...]
    members: Mapping[str, Place | None] | None = None
    manifests: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())


def damaged(message: str, *, offset: int | None = None) -> ImageError:
    """The error of a package that contradicts itself; whoever has the package's name adds it."""
    return ImageError(ErrorKind.CORRUPT, message, offset=offset, op=OPERATION)


def unsupported(message: str, remedy: str | None = None) -> ImageError:
    """The error of a package, or of a part of one, that tapfs does not open."""
    return ImageError(ErrorKind.UNSUPPORTED, message, op=OPERATION, remedy=remedy)


def numbered(disks: list[PackagedDisk]) -> tuple[PackagedDisk, ...]:
    """The disks, if they are not too many."""
    if len(disks) > MOST_DISKS:
        raise damaged(f"lists {len(disks)} disks, and at most {MOST_DISKS} are read")
    return tuple(disks)


def inner_name(name: str, what: str) -> str:
    """A name that a package gives to one of its own files, without a leading `./`.

    Raises ImageError(denied) for one that leads out of the package's folder: absolute, or with `..`.
    """
    parts = [part for part in name.split("/") if part not in {"", "."}]
    if name.startswith("/") or ".." in parts or not parts or "\0" in name:
        raise ImageError(
            ErrorKind.DENIED, f"{what} {name!r}, which leads out of it", op=OPERATION, remedy="unpack it, and mend it"
        )
    return "/".join(parts)
