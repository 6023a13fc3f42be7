"""Open the disks that a package lists, each in its place: a member of an archive, or a file that a descriptor names.

Nothing is unpacked: a member is a window of the archive's file, and the engine reads that file. The names in a
descriptor are those of a stranger, and the gate judges them as it judges the further files of an image. `tapfs info`
loads this module for every image, so what reads a package is imported late.
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Iterable
from contextlib import ExitStack, closing, contextmanager
from typing import TypedDict

from tapfs.disk.chain import Layer, layer_of_file
from tapfs.disk.open_options import OpenOptions
from tapfs.disk.packed import contents_of
from tapfs.errors import ErrorKind, ImageError
from tapfs.host.confine import LEAVING
from tapfs.host.copied import Shared
from tapfs.host.file import LocalFile
from tapfs.host.files import LocalFiles
from tapfs.host.location import Location, locate
from tapfs.host.remote.address import Address
from tapfs.host.window import WindowFile
from tapfs.packages.contents import OPERATION, Package, PackagedDisk
from tapfs.packages.signs import HEAD_BYTES, may_be_package
from tapfs.records import replace

#: The ends of names of packages.
_SUFFIXES = (".ova", ".ovf", ".vmx", ".vbox", ".xva", ".box")
#: So many disks are named in an error.
_MOST_NAMED = 20


class DiskInPackage(TypedDict):
    """One disk of a package, as `tapfs info` prints it.

    `format` and `virtual_size` are those of the image where it can be opened, else what the package says; `error` says
    why it cannot be.
    """

    number: int
    name: str
    format: str | None
    virtual_size: int | None
    error: str | None


class PackageInfo(TypedDict):
    """A package, as `tapfs info` prints it; `package` is its kind, `notes` say what it has and tapfs leaves out."""

    path: str
    package: str
    disks: list[DiskInPackage]
    notes: list[str]


class OpenPackage:
    """A package and its file, which is open until it is closed."""

    def __init__(self, shared: Shared[LocalFile], package: Package) -> None:
        """Take over this use of the file."""
        self.package = package
        self.path = shared.held.path
        self._shared = shared

    @property
    def file(self) -> LocalFile:
        """The file of the package itself."""
        return self._shared.held

    def close(self) -> None:
        """Let go of the package's file; disks that were opened keep it open."""
        self._shared.close()

    def layer(self, options: OpenOptions) -> Layer:
        """The image that `options.disk` chooses, or the only one.

        Raises ImageError: invalid_argument for several disks and no choice, read_only for writing into an archive.
        """
        path = self.path if Address.parse(self.path) is not None else os.path.abspath(self.path)
        return self._layer(options)._replace(packaged=(path, options.disk))

    def _layer(self, options: OpenOptions) -> Layer:
        disk = self._chosen(options.disk)
        inner = replace(options, disk=None)
        if disk.chunks is not None:
            self._refuse_writing(options)
            if options.format is not None:
                message = f"holds the disk {disk.name} in chunks, which have no format to be named"
                raise ImageError(ErrorKind.INVALID_ARGUMENT, message, path=self.path, op="open")
            # The archive is the image's file, and the chunks are places in it.
            whole = WindowFile(self._shared.taken(), 0, self.file.size(), member=disk.name)
            files = LocalFiles(whole, gate=options.gate, sharing=options.sharing)
            from tapfs.disk.chunked_disk import ChunkedDisk

            return Layer(whole.path, files, ChunkedDisk(disk.chunks, self.package.kind), probed=False)
        file = self._disk_file(disk, options)
        folders = (os.path.join(os.path.dirname(self.path) or ".", each) for each in disk.folders)
        layer = layer_of_file(file.path, file, replace(inner, parent_folders=(*options.parent_folders, *folders)))
        return layer if disk.parent is None else self._over(layer, disk.parent)

    def _over(self, layer: Layer, parent: int) -> Layer:
        """The layer with the disk of this package that it lies over. Raises ImageError(unsupported)."""
        if layer.driver.geometry.backing is None:
            layer.close()
            message = f"is said to lie over disk {parent} of {self.path}, and its image has no parent"
            raise ImageError(ErrorKind.UNSUPPORTED, message, path=layer.path, op=OPERATION)
        # The file of the layer keeps the package's open.
        shared, package = self._shared, self.package

        def opened(options: OpenOptions) -> Layer:
            return OpenPackage(shared, package).layer(replace(options, disk=parent))

        return layer._replace(parent=opened)

    def open_file(self, name: str, options: OpenOptions) -> LocalFile:
        """A file of the package by its name; it is the caller's. Raises ImageError."""
        if self.package.members is None:
            others = (file for disk in self.package.disks for file in disk.files if file != name)
            return _named(self.path, name, options, others)
        self._refuse_writing(options)
        return self._member(name)

    def _chosen(self, number: int | None) -> PackagedDisk:
        disks = self.package.disks
        if number is None and len(disks) == 1:
            return disks[0]
        listed = ", ".join(f"{disk.number} {disk.name}" for disk in disks[:_MOST_NAMED])
        listed += f" and {len(disks) - _MOST_NAMED} more" if len(disks) > _MOST_NAMED else ""
        if number is None:
            raise ImageError(
                ErrorKind.INVALID_ARGUMENT,
                f"holds {len(disks)} disks: {listed}",
                path=self.path,
                op="open",
                remedy="choose one with {disk=N}",
            )
        if not 1 <= number <= len(disks):
            message = f"has no disk {number}; it holds {listed}"
            raise ImageError(ErrorKind.NOT_FOUND, message, path=self.path, op="open")
        return disks[number - 1]

    def _refuse_writing(self, options: OpenOptions) -> None:
        if options.writable:
            raise ImageError(
                ErrorKind.READ_ONLY,
                f"is a package ({self.package.kind}) that holds its disks, and they are only read",
                path=self.path,
                op="open",
                remedy="convert the disk, or write to an overlay over it: {overlay=FILE} or {temp}",
            )

    def _disk_file(self, disk: PackagedDisk, options: OpenOptions) -> LocalFile:
        """The file of a disk, its pieces joined, unpacked if the package says that it is packed."""
        if len(disk.files) > 1 or disk.gzip:
            self._refuse_writing(options)
        with ExitStack() as on_error:
            pieces: list[LocalFile] = []
            for name in disk.files:
                pieces.append(self.open_file(name, options))
                on_error.callback(pieces[-1].close)
            on_error.pop_all()
        file = pieces[0]
        if len(pieces) > 1:
            from tapfs.host.joined import joined

            file = joined(pieces, os.path.join(os.path.dirname(self.path), disk.name))
        if disk.gzip:
            from tapfs.host.packed.file import unpacked  # few packages have packed files

            return unpacked(file, "gzip")
        return file

    def _member(self, name: str) -> WindowFile:
        """A member of the archive."""
        members = self.package.members or {}
        if name not in members:
            message = f"its disk is in the file {name}, which it does not hold"
            raise ImageError(ErrorKind.NOT_FOUND, message, path=self.path, op=OPERATION)
        place = members[name]
        if place is None:
            message = f"holds {name} as a link or sparse, and not as its bytes are"
            remedy = "unpack it (tar -x), and name the disk"
            raise ImageError(ErrorKind.UNSUPPORTED, message, path=self.path, op=OPERATION, remedy=remedy)
        shared = self._shared

        def beside(other: str) -> LocalFile:
            # The window that asks keeps the archive's file open.
            again = OpenPackage(shared, self.package)
            return again.open_file(os.path.normpath(os.path.join(os.path.dirname(name), other)), OpenOptions())

        return WindowFile(self._shared.taken(), place.offset, place.length, member=name, beside=beside)


def _named(descriptor: str, name: str, options: OpenOptions, others: Iterable[str]) -> LocalFile:
    """The file that a descriptor names, as the gate allows it; `others` are its other names. Raises ImageError."""
    own = Address.parse(descriptor)
    if own is not None:
        address = own.joined(name)
        location = Location(address.text, address.text, address=address, from_image=True)
        return location.open(writable=options.writable, gate=options.gate, remote=options.remote)
    path, found = _looked_up(descriptor, name, options, others)
    try:
        return LocalFile.open_found(
            found,
            path,
            writable=options.writable,
            sharing=options.sharing,
            direct=options.direct,
            request_owner=options.request_owner,
        )
    finally:
        os.close(found)


def _looked_up(descriptor: str, name: str, options: OpenOptions, others: Iterable[str]) -> tuple[str, int]:
    """The path of the file that a descriptor names, and a descriptor of it. Raises ImageError."""
    folder = os.path.dirname(descriptor)

    def found(each: str) -> tuple[str, int] | ImageError:
        path = os.path.join(folder, each)
        try:
            return path, options.gate.look_up_further(path, folder=folder)
        except ImageError as error:
            if error.op != LEAVING and error.kind is not ErrorKind.NOT_FOUND:
                raise
            return error

    first = found(name)
    if not isinstance(first, ImageError):
        return first
    beside = _beside(name, others)
    for each in beside:
        place = found(each)
        if not isinstance(place, ImageError):
            return place
    if first.op == LEAVING:
        problem = options.gate.refusal().replace("the image", "the package")
        remedy = "if you trust the package name a folder that holds both: {backing_root=DIR}"
    elif beside or _parts(name) == [name]:
        problem, remedy = "is missing", "put it beside the package"
    else:
        problem, remedy = "is missing", "put it there"
    if beside:
        problem += f", and there is no {beside[-1]} beside the package"
    raise ImageError(first.kind, f"its file {name} {problem}", path=descriptor, op=OPERATION, remedy=remedy) from first


def _beside(name: str, others: Iterable[str]) -> list[str]:
    """Where a file may be, beside the package, that is not where its name says.

    A machine that was moved has names of its old place. The file may be in the folder that the name ends with, as
    snapshots are, or have only the last part of the name. A place that another name may mean, too, is left out: two
    datastores may have files of one name. A name with `..` stays right when a machine moves.
    """
    parts = _parts(name)
    if ".." in parts:
        return []
    ends = [parts[-count:] for count in (2, 1) if len(parts) >= count]
    for other in map(_parts, others):
        ends = [end for end in ends if other[-len(end) :] != end]
    return [place for place in map("/".join, ends) if place != name]


def _parts(name: str) -> list[str]:
    """The parts of a name of Unix, of Windows, or of a datastore."""
    return [part for part in re.split(r"^\[[^\]]*\]\s*|[/\\]", name) if part not in {"", "."}]


def package_in(file: LocalFile) -> Package | None:
    """The package that an open file is; None if it is none, or has no disk. Raises ImageError; the file stays open."""
    from tapfs.packages.reading import read_package

    try:
        package = read_package(file.read, file.size(), name=os.path.basename(file.path))
    except ImageError as error:
        error.path = error.path or file.path
        raise
    return package if package is not None and package.disks else None


@contextmanager
def package_of(path: str, options: OpenOptions) -> Generator[OpenPackage | None]:
    """The package at a path, opened to be read, for who looks at all of it; None if it is none.

    Nor is one whose format somebody has said. What lies elsewhere is looked at only if its name is that of a package,
    for a look fetches.
    """
    location = locate(path)
    by_name = location.address is None or location.address.text.lower().endswith(_SUFFIXES)
    if (options.format is not None and options.disk is None) or location.in_memory or not by_name:
        yield None
        return
    file = location.open(sharing=options.sharing, remote=options.remote)
    with closing(contents_of(file, None, writable=False)) as file:
        package = package_in(file) if may_be_package(file.read(0, HEAD_BYTES)) else None
        yield None if package is None else OpenPackage(Shared(file), package)


def layer_of_package(file: LocalFile, options: OpenOptions, location: Location) -> Layer | None:
    """The layer of a disk in an open file that may be a package, which is closed then; None: it is none, and open."""
    try:
        package = package_in(file)
    except BaseException:
        file.close()
        raise
    if package is None:
        return None
    if file.writable:
        # A descriptor is not written, only the disks that it names. Nothing may write it meanwhile.
        file.close()
        file = location.open(sharing=options.sharing, remote=options.remote)
    with closing(OpenPackage(Shared(file), package)) as opened:
        return opened.layer(options)


def describe_package(opened: OpenPackage, options: OpenOptions) -> PackageInfo:
    """What `tapfs info` says of a package. A disk that cannot be opened is told with the reason."""
    disks: list[DiskInPackage] = []
    for disk in opened.package.disks:
        kind, size, problem = disk.format, disk.size, None
        try:
            with closing(opened.layer(replace(options, disk=disk.number, writable=False))) as layer:
                kind, size = layer.driver.format_name, layer.driver.geometry.virtual_size
        except ImageError as error:
            problem = str(error)
        disks.append({"number": disk.number, "name": disk.name, "format": kind, "virtual_size": size, "error": problem})
    package = opened.package
    return {"path": opened.path, "package": package.kind, "disks": disks, "notes": list(package.notes)}
