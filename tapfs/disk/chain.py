"""Opening a backing chain: an image, its parent, the parent's parent, down to the last.

An image is hostile input, and the name of its parent most of all. The rules:

* parents are opened read-only, by the format that the header or the user names;
* where neither does, the parent is probed, but a probed parent that itself names a further
  file is refused: a guest can write such a header into a raw disk;
* a loop is found, a chain is at most `MAX_DEPTH` long;
* the gate (`tapfs.host.gate`) decides which files the images may name; of others nothing is opened or told;
* a raw image found by probing is never writable: a guest can forge a magic the other way;
* a file of a format that tapfs does not read is never taken for raw unless the user says so.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence

from tapfs.disk.bases import refuse_written_base
from tapfs.disk.format_choice import driver_of, guessed_format, named_format
from tapfs.disk.open_options import DEFAULT_CACHE_BYTES, OpenOptions
from tapfs.disk.packed import contents_of
from tapfs.disk.parent_search import sought_parent
from tapfs.disk.parents import is_missing, named_parent, require_identity
from tapfs.disk.recovery import recover
from tapfs.disk.table_work import use_engine_for_tables
from tapfs.driver import (
    MAX_DISK_BYTES,
    BackingReference,
    Driver,
    Format,
    OpenRequest,
    Snapshotted,
    WritableDriver,
)
from tapfs.errors import ErrorKind, ImageError
from tapfs.host.base_marks import format_taken_over
from tapfs.host.confine import LEAVING
from tapfs.host.file import LocalFile
from tapfs.host.files import LocalFiles, all_identities
from tapfs.host.gate import Gate
from tapfs.host.location import Location, is_protocol, locate
from tapfs.host.lock import Sharing
from tapfs.host.scratch import ScratchFile
from tapfs.host.window import WindowFile
from tapfs.packages.signs import HEAD_BYTES, may_be_package
from tapfs.records import NamedTuple, replace

#: The options are of another module, and those who open chains find them here, too.
__all__ = [
    "DEFAULT_CACHE_BYTES",
    "MAX_DEPTH",
    "OPENING_PARENT",
    "Layer",
    "OpenOptions",
    "add_parents",
    "files_below",
    "is_encrypted",
    "layer_of_file",
    "layer_of_files",
    "open_layer",
    "open_layers",
    "open_parents",
    "parent_is_missing",
    "parent_location",
]

MAX_DEPTH = 128

#: The operation (`ImageError.op`) of an error about a missing or refused parent.
OPENING_PARENT = "open the backing file"


class Layer(NamedTuple):
    """One image of a chain: its host files, and the driver that maps it into them; `snapshot`: of a disk inside it.

    `parent` opens the parent where a package says which of its disks that is. `packaged`: the package that it lies in,
    and the number of the disk there, if one was chosen.
    """

    path: str
    files: LocalFiles
    driver: Driver
    probed: bool
    snapshot: str | None = None
    parent: Callable[[OpenOptions], Layer] | None = None
    packaged: tuple[str, int | None] | None = None

    @property
    def file(self) -> LocalFile:
        """File 0: the one that was named."""
        return self.files.image

    def close(self) -> None:
        """Close its host files."""
        self.files.close()


def open_layers(path: str, options: OpenOptions) -> list[Layer]:
    """Open `path` and its parents, top first. On an error everything is closed again."""
    return open_parents([open_layer(path, options)], options)


def open_layer(path: str, options: OpenOptions) -> Layer:
    """Open the one image `path` without its parents. It may be a package, of which a disk is opened."""
    location = locate(path)
    file = _open_file(location, options)
    # Who says a format takes the file as it is, unless a disk of a package is chosen.
    may_hold_disks = options.disk is not None or (options.format is None and not options.created)
    if may_hold_disks and not location.in_memory:
        file = contents_of(file, None, writable=options.writable)
        try:
            head = file.read(0, HEAD_BYTES)
        except BaseException:
            file.close()
            raise
        if may_be_package(head):
            from tapfs.disk.package import layer_of_package  # few images are in packages

            layer = layer_of_package(file, options, location)
            if layer is not None:
                return layer
        if options.disk is not None:
            file.close()
            message = f"is no package of disks, so there is no disk {options.disk}"
            raise ImageError(ErrorKind.INVALID_ARGUMENT, message, path=location.name, op="open")
        return layer_of_file(location.name, file, options, unpack=False)
    return layer_of_file(location.name, file, options, format_name=location.format_name)


def _open_located(location: Location, options: OpenOptions, *, gate: Gate | None = None) -> Layer:
    file = _open_file(location, options, gate=gate)
    return layer_of_file(location.name, file, options, format_name=location.format_name)


def _open_file(location: Location, options: OpenOptions, *, gate: Gate | None = None) -> LocalFile:
    return location.open(
        writable=options.writable,
        sharing=options.sharing,
        direct=options.direct,
        request_owner=options.request_owner,
        gate=gate,
        remote=options.remote,
    )


def layer_of_file(
    path: str, file: LocalFile, options: OpenOptions, *, format_name: str | None = None, unpack: bool = True
) -> Layer:
    """The layer that an open file and the files that it names hold; closes them on an error.

    `format_name` is what the file's name says of its format, unless the options say it. `unpack`: it may be packed.
    """
    if unpack:
        file = contents_of(file, options.format or format_name, writable=options.writable and not options.created)
    files = LocalFiles(file, gate=options.gate, sharing=options.sharing, remote=options.remote)
    return layer_of_files(path, files, options, format_name=format_name)


def layer_of_files(path: str, files: LocalFiles, options: OpenOptions, *, format_name: str | None = None) -> Layer:
    """The layer in host files of which at least file 0 is open, as `layer_of_file`."""
    try:
        named = options.format or format_name
        if named is not None:
            named = format_taken_over(files.image.descriptor) or named
        if named is None:
            found = guessed_format(files.image, writable=options.writable, say_raw=options.say_raw)
        else:
            found = named_format(named, path)
        driver = _open_driver(found, files, options)
        # A repair, which is lenient, changes nothing that a guest reads.
        if options.writable and not (options.write_base or options.created or options.lenient):
            refuse_written_base(files.image, lambda overlay: files_below(overlay, OpenOptions()))
    except BaseException:
        files.close()
        raise
    return Layer(path, files, driver, probed=named is None, snapshot=options.snapshot)


def _open_driver(found: Format, files: LocalFiles, options: OpenOptions) -> Driver:
    file = files.image
    if options.writable and not options.lenient:
        use_engine_for_tables()  # writers of some formats look at all tables first
    request = OpenRequest(
        writable=options.writable,
        lenient=options.lenient,
        snapshot=options.snapshot,
        further=files,
        scratch=ScratchFile if options.lenient else None,
        created=options.created,
        grown_size=options.grown_size,
        cut=options.cut and not options.writable,
    )
    files.cut = request.cut
    if options.snapshot is not None and options.writable:
        raise ImageError(ErrorKind.READ_ONLY, "a snapshot is only read", path=file.path, op="open")
    if options.salvage is not None:
        from tapfs.disk.salvaging import lay_salvage_over  # few images need it

        lay_salvage_over(found, files, options.salvage)
    driver = driver_of(found, files.seen(0), request)
    if options.snapshot is not None and not isinstance(driver, Snapshotted):
        raise ImageError(ErrorKind.UNSUPPORTED, f"{found.name} images have no snapshots", path=file.path, op="open")
    if recover(driver, files, writable=options.writable):
        driver = driver_of(found, files.seen(0), request)
    if options.writable and not isinstance(driver, WritableDriver):
        raise ImageError(
            ErrorKind.READ_ONLY,
            f"tapfs does not write {found.name} images",
            path=file.path,
            op="open",
            remedy="convert it, or write to an overlay over it",
        )
    size = driver.geometry.virtual_size
    if size > MAX_DISK_BYTES:
        raise ImageError(
            ErrorKind.OUT_OF_BOUNDS,
            f"a disk of {size} bytes is too large: tapfs serves at most {MAX_DISK_BYTES} bytes",
            path=file.path,
            op="open",
        )
    return driver


def is_encrypted(layers: Iterable[Layer]) -> bool:
    """Whether any image of a chain is encrypted."""
    return any(layer.driver.geometry.cipher is not None for layer in layers)


def open_parents(layers: list[Layer], options: OpenOptions) -> list[Layer]:
    """Add the parents of the last layer. On an error every layer is closed."""
    try:
        add_parents(layers, options)
    except BaseException:
        for layer in layers:
            layer.close()
        raise
    return layers


def add_parents(layers: list[Layer], options: OpenOptions) -> None:
    """Open the parents of the last layer and append them. On an error those that were opened stay."""
    while (parent := parent_location(layers, options)) is not None:
        if len(layers) >= MAX_DEPTH:
            raise ImageError(
                ErrorKind.UNSUPPORTED,
                f"the backing chain is longer than {MAX_DEPTH} images",
                path=layers[0].path,
                op="open",
            )
        layers.append(_open_parent(layers, parent, options))


def parent_location(layers: Sequence[Layer], options: OpenOptions) -> Location | None:
    """Where the parent of the last layer is said to be, or None.

    Raises ImageError where the image names no file and the search for its parent (`tapfs.disk.parent_search`) fails.
    """
    child = layers[-1]
    reference = child.driver.geometry.backing
    if reference is None:
        if len(layers) == 1 and options.backing is not None:
            raise ImageError(ErrorKind.UNSUPPORTED, "has no backing file to replace", path=child.path, op="open")
        return None
    if len(layers) == 1 and options.backing is not None:
        return locate(options.backing)
    return _named_or_sought(child.path, reference, options)


def _named_or_sought(child: str, reference: BackingReference, options: OpenOptions) -> Location:
    if reference.search is None:
        return named_parent(child, reference, options.gate)
    looking = OpenOptions(gate=options.gate, sharing=Sharing.UNCHECKED)

    def open_image(location: Location) -> Layer:
        return _open_located(location, looking, gate=options.gate)

    return sought_parent(child, reference, reference.search, options.parent_folders, open_image, op=OPENING_PARENT)


def parent_is_missing(child: Layer, options: OpenOptions) -> bool:
    """Whether the parent that an image names is not there, as far as the gate lets anybody know. It is not opened.

    A parent that had to be searched for is not missing: nobody has looked.
    """
    reference = child.driver.geometry.backing
    if options.backing is None and reference is not None and reference.search is not None:
        return False
    if child.parent is not None:
        return False
    try:
        member = _member_beside(child, options, depth=1)
    except ImageError as error:
        return error.kind is ErrorKind.NOT_FOUND
    if member is not None:
        member.close()
        return False
    location = parent_location([child], options)
    return location is not None and is_missing(location, options.gate)


def _open_parent(layers: Sequence[Layer], location: Location, options: OpenOptions) -> Layer:
    child = layers[-1]
    depth = len(layers)
    reference = child.driver.geometry.backing
    format_name = options.backing_formats[depth - 1] if depth <= len(options.backing_formats) else None
    if format_name is None and reference is not None:
        format_name = reference.format
    parent_options = OpenOptions(
        format=format_name,
        writable=depth in options.writable_parents,
        write_base=True,  # it has the overlays that are open here
        lenient=options.lenient,
        gate=options.gate,
        direct=options.direct,
        request_owner=options.request_owner,
        sharing=options.sharing,
        remote=options.remote,
        say_raw="say {backing_format=raw} (once for each parent, nearest first)",
    )
    try:
        if child.parent is not None and not _is_replaced(options, depth):
            layer = child.parent(parent_options)
        elif (member := _member_beside(child, options, depth=depth)) is not None:
            layer = layer_of_file(member.path, member, parent_options)
        else:
            layer = _located_parent(location, parent_options, options.gate)
    except ImageError as error:
        raise _explained(error, child, location, options, depth=depth) from error
    try:
        _check_parent(layers, layer)
        if reference is not None and not options.any_parent:
            require_identity(child.path, reference, layer.path, layer.driver, op=OPENING_PARENT)
        if parent_options.writable and not options.write_base:
            ours = all_identities([each.files for each in layers])
            refuse_written_base(layer.file, lambda overlay: files_below(overlay, OpenOptions()), own=ours)
    except BaseException:
        layer.close()
        raise
    return layer


def _located_parent(location: Location, parent_options: OpenOptions, gate: Gate) -> Layer:
    """The parent at a place; it may be a disk of a package, which is no file. Raises ImageError."""
    try:
        return _open_located(location, parent_options, gate=gate)
    except ImageError as error:
        if error.kind is not ErrorKind.NOT_FOUND:
            raise
        from tapfs.disk.packaged_parent import packaged_parent  # most parents are files

        layer = packaged_parent(location, parent_options)
        if layer is None:
            raise
        return layer


def _is_replaced(options: OpenOptions, depth: int) -> bool:
    """Whether the user has named another parent of the image."""
    return depth == 1 and options.backing is not None


def _member_beside(child: Layer, options: OpenOptions, *, depth: int) -> LocalFile | None:
    """The parent of an image that lies in an archive, which is looked for beside it there; None: it is any other file.

    Raises ImageError.
    """
    reference = child.driver.geometry.backing
    replaced = _is_replaced(options, depth)
    if not isinstance(child.file, WindowFile) or reference is None or replaced or options.gate == Gate.nothing():
        return None
    if reference.search is not None or is_protocol(reference.name) or os.path.isabs(reference.name):
        return None
    return child.file.open_beside(reference.name)


def _explained(error: ImageError, child: Layer, location: Location, options: OpenOptions, *, depth: int) -> ImageError:
    """The error of a parent that could not be opened, so that it says whose parent that is."""
    op = OPENING_PARENT
    if error.op == LEAVING:
        message = f"its backing file {location.name} {options.gate.refusal(location.address)}"
        remedy = None
        if location.address is not None:
            remedy = f"if you trust the image with it say {{backing_root={location.address.folder}}}"
        return ImageError(ErrorKind.DENIED, message, path=child.path, op=op, remedy=remedy)
    if error.kind is not ErrorKind.NOT_FOUND:
        return error
    reference = child.driver.geometry.backing
    if reference is not None and not _is_replaced(options, depth) and is_protocol(reference.name):
        return ImageError(
            ErrorKind.UNSUPPORTED,
            f"its backing file is no local file: {reference.name!r}",
            path=child.path,
            op=op,
            remedy="name a local copy with {backing=FILE}",
        )
    return ImageError(
        ErrorKind.NOT_FOUND,
        f"its backing file {location.name} is missing",
        path=child.path,
        op=op,
        remedy="name it with {backing=FILE}" if depth == 1 else None,
    )


def files_below(path: str, options: OpenOptions) -> set[tuple[int, int]]:
    """Device and inode of every file of the image `path` and of the images below it, as far as they can be followed.

    It is asked which file must not be replaced, so a format that nothing says is guessed: only headers are read.
    """
    found: set[tuple[int, int]] = set()
    location: Location | None = locate(path)
    looking = replace(options, writable=False, lenient=True, sharing=Sharing.UNCHECKED)
    while location is not None:
        identity = location.identity()
        if identity is None or identity in found:
            break
        found.add(identity)
        try:
            layer = _open_located(location, looking)
        except ImageError:
            break
        found |= set(layer.files.identities)
        layer.close()
        reference = layer.driver.geometry.backing
        try:
            location = None if reference is None else _named_or_sought(layer.path, reference, looking)
        except ImageError:
            break
        looking = replace(looking, format=None if reference is None else reference.format)
    return found


def _check_parent(layers: Sequence[Layer], parent: Layer) -> None:
    if any(layer.files.places & parent.files.places for layer in layers):
        raise ImageError(ErrorKind.CORRUPT, "the backing chain comes back to this file", path=parent.path, op="open")
    if parent.probed and (parent.driver.geometry.backing is not None or len(parent.files) > 1):
        name = parent.driver.format_name
        raise ImageError(
            ErrorKind.DENIED,
            f"this backing file looks like {name} and names a further file, but nothing says that it is {name}",
            path=parent.path,
            op=OPENING_PARENT,
            remedy=f"if you trust it say {{backing_format={name}}} (once for each parent, nearest first)",
        )
