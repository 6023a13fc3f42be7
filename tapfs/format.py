"""A format as the registry knows it: how its images are probed, opened and created, and what is special about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Protocol, runtime_checkable

from tapfs.ciphers import Cryptography
from tapfs.driver_protocols import Driver, Scratch
from tapfs.errors import ErrorKind, ImageError
from tapfs.geometry import BackingReference
from tapfs.host_files import FurtherFiles, HostFile, NoFurtherFiles
from tapfs.plan import Plan
from tapfs.records import dataclass, field


@dataclass(frozen=True, slots=True)
class OpenRequest:
    """How to open an image.

    `lenient`: for check and repair, which must get as far as a damaged image allows. `further`
    opens the other host files that the image names; their number follows the order of opening. `snapshot` is the
    name of the disk inside the image that is wanted, None the current one; a `Snapshotted` driver raises
    ImageError(not_found) for a name that it has not.
    `created`: the image was made a moment ago, is empty, and is to be filled.
    `grown_size`: the disk is to be taken as so many bytes, more than it has; there is room for them in the image
    (`Resizable.make_room`), and the core zeroes what is there before the size is true.
    `scratch` makes space for a check to work in. A check without it keeps in memory what it needs.
    `cut`: the file may have been cut, and what is left of it is wanted. Data that the end of the file cuts is mapped
    whole, and the core takes what lies behind the end for lost. It is only read then.
    """

    writable: bool = False
    lenient: bool = False
    snapshot: str | None = None
    further: FurtherFiles = field(default_factory=NoFurtherFiles)
    scratch: Callable[[], Scratch] | None = None
    created: bool = False
    grown_size: int | None = None
    cut: bool = False


@dataclass(frozen=True, slots=True)
class CreateRequest:
    """What to create. `options` are the `-o` pairs; a driver refuses those it does not know.

    `backing_mtime` is the parent's modification time in whole seconds since 1970, `parent` is the open parent.
    `name` is the file name of the new image without its folder, for formats that write it into their metadata.
    An `encrypted` image is to be opened by `password`, with a secret that `cryptography` makes.
    `compressed`: the image is to be filled with packed data. A format that has a layout of its own for that takes it.
    """

    virtual_size: int
    backing: BackingReference | None = None
    backing_mtime: int = 0
    options: Mapping[str, str] = field(default_factory=dict[str, str])
    encrypted: bool = False
    password: bytes = field(default=b"", repr=False)
    cryptography: Cryptography | None = None
    name: str = ""
    parent: Driver | None = None
    compressed: bool = False

    def secret(self) -> tuple[bytes, Cryptography]:
        """The password and the primitives. Raises ImageError(denied) where nobody has given a password."""
        if not self.password or self.cryptography is None:
            raise ImageError(ErrorKind.DENIED, "needs a password", op="create", remedy="give it with {password}")
        return self.password, self.cryptography


@runtime_checkable
class Format(Protocol):
    """A format as the registry knows it: a module-level object, also the entry-point target."""

    @property
    def name(self) -> str:
        """The name that `-f` and `-O` take."""
        ...

    def probe(self, head: bytes, size: int) -> int:
        """Confidence 0 to 100 that a file of `size` bytes starting with `head` is one of these."""
        ...

    def open(self, file: HostFile, request: OpenRequest) -> Driver:
        """A driver for this file. Raises ImageError(invalid_format, unsupported, corrupt)."""
        ...


@runtime_checkable
class Trailed(Format, Protocol):
    """A format whose images show at their end what they are."""

    def probe_tail(self, tail: bytes, size: int) -> int:
        """Confidence 0 to 100 that a file of `size` bytes that ends with `tail` is one of these.

        It is asked where no format claims the start of the file. `tail` has 4096 bytes, or the whole of a shorter file.
        """
        ...


@runtime_checkable
class CreatableFormat(Format, Protocol):
    """A format of which new images can be made."""

    @property
    def create_options(self) -> Mapping[str, str]:
        """The `-o` options with a line of help each."""
        ...

    def create(self, request: CreateRequest) -> Plan:
        """The plan that turns an empty host file into a new image.

        Raises ImageError(unsupported, out_of_bounds) for what the format cannot hold.
        """
        ...


@runtime_checkable
class AmendableFormat(Format, Protocol):
    """A format of whose images some choices can be changed in place (`tapfs.edit_protocols.Amendable`)."""

    @property
    def amend_options(self) -> Mapping[str, str]:
        """The `-o` options with a line of help each."""
        ...


class Ability(StrEnum):
    """What the images of a format can do besides being read."""

    #: The disk can be written in place.
    WRITE = "write"
    #: An image can name a parent.
    BACKING = "backing"
    #: New images can be compressed, or encrypted.
    COMPRESS = "compress"
    ENCRYPT = "encrypt"
    CHECK = "check"
    REPAIR = "repair"
    #: An image can hold snapshots beside its current disk, and they can be read.
    SNAPSHOTS = "snapshots"
    #: The disk of an image can get another size.
    RESIZE = "resize"


@runtime_checkable
class DescribedFormat(Format, Protocol):
    """A format that says what it can do, for `tapfs formats`. Nothing else depends on it."""

    @property
    def abilities(self) -> frozenset[Ability]:
        """All that it can do besides being read and created."""
        ...


class Trait(StrEnum):
    """What is special about a format, so that nobody needs to compare its name."""

    #: A file that no format claims is taken for one of these.
    GUESSED = "guessed"
    #: The contents of a file do not prove the format enough for writing: the user must name the format.
    NAMED_TO_WRITE = "named to write"
    #: A new image may be a block device, because it has its full length from the start.
    ON_DEVICE = "on device"
    #: A new image has a password, whether anybody asks for encryption or not.
    ALWAYS_ENCRYPTED = "always encrypted"
    #: Its images live in memory, under names of their own (`tapfs.host.ram`).
    IN_MEMORY = "in memory"


@runtime_checkable
class SpecialFormat(Format, Protocol):
    """A format with traits. Most have none, and then nothing is special about them."""

    @property
    def traits(self) -> frozenset[Trait]:
        """What is special about it."""
        ...


def has_trait(found: Format, trait: Trait) -> bool:
    """Whether a format has a trait."""
    # A survey asks it for each image, and isinstance of a protocol takes a tenth of what opening one does.
    traits: frozenset[Trait] = getattr(found, "traits", frozenset())
    return trait in traits


@runtime_checkable
class MultiFileFormat(CreatableFormat, Protocol):
    """A creatable format whose images may consist of several host files."""

    def further_names(self, request: CreateRequest) -> Sequence[str]:
        """The names of files 1, 2, … that the plan of `create` writes, in the folder of the image.

        Empty for a request that makes a single file. Raises ImageError as `create` does.
        """
        ...


@runtime_checkable
class KeepingFormat(MultiFileFormat, Protocol):
    """A format whose new image may take up a file that is there already."""

    def kept_names(self, request: CreateRequest) -> Sequence[str]:
        """Those of the further names whose files are there and stay, contents and all.

        The plan of `create` makes such a file no shorter, and writes nothing to it.
        """
        ...
