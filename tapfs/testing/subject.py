"""The subject of a suite: a format, and its images, which the suite makes or which are given."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import cast

from tapfs.disk.probe import format_named
from tapfs.driver import (
    BackingReference,
    CreatableFormat,
    CreateRequest,
    Driver,
    Format,
    MultiFileFormat,
    OpenRequest,
    Recoverable,
    Snapshotted,
    Trait,
    WritableDriver,
    has_trait,
)
from tapfs.records import dataclass, field, replace
from tapfs.testing.cryptography import PlainCryptography
from tapfs.testing.model import MemoryFile, ModelDisk, read_extents

#: The modification time that overlays are told of their parent.
_MTIME = 1_234_567_890
_PARENT = "/images/parent"


#: The members of Driver and of WritableDriver.
_DRIVER = ("format_name", "geometry", "map", "details")
_WRITING = ("reserve", "commit", "abort", "unflushed_bytes", "flush", "flushed")


def _partly(thing: object, what: str, members: Sequence[str]) -> str | None:
    """The members that a thing lacks, if it has others of them."""
    there = [name for name in members if hasattr(thing, name)]
    missing = [name for name in members if name not in there]
    return f"{what} has {', '.join(there)} and lacks {', '.join(missing)}" if there and missing else None


class ViolationError(AssertionError):
    """A driver breaks the contract of `tapfs.driver`. The message says how."""


def require(holds: bool, message: str) -> None:  # noqa: FBT001  reads as a sentence
    """Raise ViolationError unless something holds."""
    if not holds:
        raise ViolationError(message)


@dataclass(frozen=True, slots=True)
class Subject:
    """A format under test. `size` is that of new disks in bytes, `options` are for creating them.

    With `overlay` new images name a parent, whose disk is three quarters as long and full of noise. `images` are
    contents of files of the format, for one that creates none. `may_leak`: the images of a subclass may hold space that
    nothing refers to, which their driver gives to nobody. `edited`: snapshots and new sizes are among the requests.
    """

    format: Format
    size: int = (3 << 20) + 1536
    options: Mapping[str, str] = field(default_factory=dict[str, str])
    overlay: bool = False
    images: Sequence[bytes] = ()
    may_leak: bool = False
    edited: bool = False

    @property
    def writable(self) -> bool:
        """Whether the format makes images that can be written."""
        if not isinstance(self.format, CreatableFormat):
            return False
        return isinstance(self.opened(self.new_file(), writable=True), WritableDriver)

    def unfinished(self) -> str | None:
        """The members that the format or its driver lacks, where it has others of the same protocol; else None.

        A protocol with a part missing counts as one that is not there, so its suites would be left out without a word.
        """
        creates = _partly(self.format, "the format", ("create", "create_options"))
        if creates is not None:
            return creates
        if isinstance(self.format, CreatableFormat):
            file = self.new_file()
        elif self.images:
            file = MemoryFile(self.images[0])
        else:
            return None
        driver = self.format.open(file, OpenRequest(writable=isinstance(self.format, CreatableFormat), further=file))
        return _partly(driver, "the driver", _DRIVER) or _partly(driver, "the driver", _WRITING)

    def new_file(self) -> MemoryFile:
        """A host file with a new, empty image."""
        encrypted = has_trait(self.format, Trait.ALWAYS_ENCRYPTED) or any(
            option.startswith("encrypt.") for option in self.options
        )
        request = CreateRequest(
            self.size,
            options=dict(self.options),
            name="image",
            encrypted=encrypted,
            password=b"password" if encrypted else b"",
            cryptography=PlainCryptography() if encrypted else None,
        )
        if self.overlay:
            # Some formats want a parent of their own, and write down what it is.
            parent = replace(self, overlay=False, options={}, size=self.size * 3 // 4)
            opened = parent.opened(parent.new_file())
            reference = BackingReference(_PARENT, self.format.name)
            request = replace(request, backing=reference, backing_mtime=_MTIME, parent=opened)
        names = self.format.further_names(request) if isinstance(self.format, MultiFileFormat) else ()
        file = MemoryFile(further={name: MemoryFile(path=name) for name in names})
        file.apply(cast("CreatableFormat", self.format).create(request))
        return file

    def opened(
        self, file: MemoryFile, *, writable: bool = False, lenient: bool = False, grown_size: int | None = None
    ) -> Driver:
        """A driver for the file. A journal that a crash has left is replayed, in the file itself if it is writable."""
        return self.recovered(file, writable=writable, lenient=lenient, grown_size=grown_size)[0]

    def recovered(
        self,
        file: MemoryFile,
        *,
        writable: bool = False,
        lenient: bool = False,
        grown_size: int | None = None,
        snapshot: str | None = None,
    ) -> tuple[Driver, MemoryFile]:
        """The same, and the file that the driver reads: for a reader whose image has a journal it is another."""
        request = OpenRequest(writable=writable, lenient=lenient, further=file, grown_size=grown_size)
        request = replace(request, snapshot=snapshot)
        driver = self.format.open(file, request)
        plan = driver.recovery() if isinstance(driver, Recoverable) else None
        if not plan:
            return driver, file
        if not writable:
            file = file.copy()
        file.apply(plan)
        return self.format.open(file, replace(request, further=file)), file

    def begin(self, choice: random.Random) -> tuple[MemoryFile, bytes]:
        """An image to be changed, all of it durable, and the bytes of the disk below it.

        A subclass may begin with any image. Here it is a new one, which reads as its parent does.
        """
        file, parent = self.new_file().copy(), self.parent(choice)
        read = self.whole(file, parent)
        below = parent[: len(read)].ljust(len(read), b"\0")
        require(read == below, "a new image reads otherwise than its parent, or zeros where there is none")
        return file, parent

    def whole(self, file: MemoryFile, parent: bytes, snapshot: str | None = None) -> bytes:
        """What a reader makes of the whole disk, or of a snapshot. The file is left as it is."""
        reader, shown = self.recovered(file, snapshot=snapshot)
        return read_extents(reader, shown, 0, reader.geometry.virtual_size, parent)

    def snapshots(self, file: MemoryFile, parent: bytes) -> dict[str, bytes]:
        """The disks of the snapshots inside an image, by name."""
        driver = self.opened(file)
        names = driver.snapshots() if isinstance(driver, Snapshotted) else ()
        return {name: self.whole(file, parent, name) for name in names}

    def readers(self, file: MemoryFile, parent: bytes, *, crashed: bool) -> Mapping[str, bytes]:
        """What other readers make of the disk, by their names; a subclass may know some.

        `crashed`: the image is what a crash has left.
        """
        del file, parent, crashed
        return {}

    def leaks(self, file: MemoryFile, parent: bytes, snapshots: Mapping[str, bytes]) -> int | None:
        """How much another checker finds leaked, None without one; it raises where something is wrong.

        A subclass may look at anything else here: `snapshots` are the disks that the image must keep beside its own.
        """
        del file, parent, snapshots
        return None

    def parent(self, choice: random.Random) -> bytes:
        """The bytes of the disk below a new image."""
        return choice.randbytes(self.size * 3 // 4) if self.overlay else b""

    def disk(self, file: MemoryFile, parent: bytes) -> ModelDisk:
        """The image in the file, to be written."""
        return ModelDisk(cast("WritableDriver", self.opened(file, writable=True)), file, parent)

    def seeds(self, choice: random.Random) -> list[MemoryFile]:
        """Good images: those that were given, and some that were made and written to."""
        seeds = [MemoryFile(image) for image in self.images]
        if self.writable:
            for requests in (0, 12):
                file = self.new_file()
                disk = self.disk(file, self.parent(choice))
                size = disk.driver.geometry.virtual_size
                for _ in range(requests):
                    offset = choice.randrange(size)
                    disk.write(offset, choice.randbytes(min(choice.randrange(1, 9000), size - offset)))
                disk.flush()
                seeds.append(file.copy())
        elif isinstance(self.format, CreatableFormat):
            seeds.append(self.new_file().copy())
        return seeds


def subject_named(
    name: str,
    *,
    size: int | None = None,
    options: Mapping[str, str] | None = None,
    overlay: bool = False,
    images: Sequence[Path] = (),
) -> Subject:
    """A subject by the name of an installed format, or by ``module:OBJECT``. Raises ImageError, ImportError."""
    module, colon, attribute = name.partition(":")
    found = cast("Format", getattr(import_module(module), attribute)) if colon else format_named(name)
    contents = [path.read_bytes() for path in images]
    subject = Subject(found, options=options or {}, overlay=overlay, images=contents)
    return subject if size is None else replace(subject, size=size)
