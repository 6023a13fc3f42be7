"""Create images.

A new file appears under its name only when it is complete and durable. Until then the file has no name at all
(O_TMPFILE), or a hidden one where the host has no such files. So a failure or a kill leaves either the finished image
or the file that was there before.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TypeVar

from tapfs.disk.bases import note_parent, refuse_written_base
from tapfs.disk.chain import OpenOptions, files_below, layer_of_files, open_layer
from tapfs.disk.image import Image
from tapfs.disk.opening import open_kind_on
from tapfs.disk.password import password_of, require_bytes
from tapfs.disk.probe import format_named
from tapfs.driver import (
    MAX_DISK_BYTES,
    BackingReference,
    CreatableFormat,
    CreateRequest,
    Cryptography,
    KeepingFormat,
    MultiFileFormat,
    Trait,
    has_trait,
)
from tapfs.errors import ErrorKind, ImageError
from tapfs.host.file import LocalFile
from tapfs.host.files import LocalFiles
from tapfs.host.location import locate, locate_parent, stored_parent
from tapfs.host.new_files import NewFiles
from tapfs.host.remote_target import target_at
from tapfs.host.target import Target
from tapfs.plan import Plan
from tapfs.records import NamedTuple, dataclass, field, replace

_Image = TypeVar("_Image", bound=Image)

#: So many bytes at either end of a device have to be zeros for it to be blank.
_DEVICE_END_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class NewImage:
    """What to make. `size` in bytes; None takes the parent's. `options` are the -o pairs.

    `backing` is written into the image as it is given, but that a name with a colon before its first slash gets a ./
    for QEMU, which takes it for an address otherwise, and that `ram:NAME` becomes the path of its file.
    `backing_format` only says what the parent is. A `password` makes an encrypted image. `compressed`: packed data
    is to fill it (`convert` says so).
    """

    format: str
    size: int | None
    backing: str | None = None
    backing_format: str | None = None
    options: Mapping[str, str] = field(default_factory=dict[str, str])
    password: bytes | None = field(default=None, repr=False)
    compressed: bool = False

    def __post_init__(self) -> None:
        require_bytes(self.password)


def create_image(path: str, new: NewImage, *, overwrite: bool = False) -> None:
    """Create an empty image; raises ImageError(exists) if there is something already, unless `overwrite`."""
    path = locate(path).name
    with begun_image(path, new, overwrite=overwrite, keeps=True) as begun:
        if begun.on_device:
            with open_filled(path, new, begun) as image:
                image.write_zeroes(0, begun.size)
        else:
            with contextlib.ExitStack() as stack:
                files = [stack.enter_context(contextlib.closing(file)) for file in begun.files.open()]
                _execute(files, begun.plan)
        begun.files.publish(overwrite=overwrite)
        begun.note_parent(path)


@contextlib.contextmanager
def new_image(
    path: str,
    new: NewImage,
    *,
    overwrite: bool = False,
    zeroed: bool = True,
    proved: Callable[[Image], None] | None = None,
) -> Generator[Image]:
    """A new image, open for writing; when the block ends well it is complete, durable and named.

    If the block raises, or the process ends in it, nothing is left and what was there stays. What is written in place
    (`tapfs.host.new_file`) keeps what was written. The new image reads as zeros (or as its parent) wherever nothing
    has been written to it, up to the size that was asked for. A block device keeps what it holds behind that. Unless
    `zeroed` it keeps what it holds before that, too; a disk that starts as noise (`starts_as_noise`) stays so. `proved`
    is given the finished image, opened anew for reading, before that has its name; what it raises ends the work.
    """
    path = locate(path).name
    with begun_image(path, new, overwrite=overwrite) as begun:
        image = open_filled(path, new, begun)
        try:
            if zeroed and starts_as_noise(image):
                image.write_zeroes(0, begun.size)
            yield image
        except BaseException:
            image.abandon()
            raise
        image.close()
        if proved is not None:
            with contextlib.closing(_open_finished(path, new, begun)) as finished:
                proved(finished)
        begun.files.publish(overwrite=overwrite)
        begun.note_parent(path)


def starts_as_noise(image: Image) -> bool:
    """Whether what nobody wrote reads as noise: on a block device, in a payload that is encrypted as a whole."""
    geometry = image.layers[0].driver.geometry
    return image.is_device or (geometry.identity is not None and geometry.cipher is not None)


class BegunImage(NamedTuple):
    """The files to be made and the plan that fills them.

    `further` are the names of those beside the image that belong to it; `size` is that of the disk, in bytes. `parent`:
    the file that the image lies over.
    """

    files: NewFiles
    further: tuple[str, ...]
    plan: Plan
    size: int
    on_device: bool
    parent: LocalFile | None

    def note_parent(self, path: str) -> None:
        """Note on the parent that the image, which has its name now, lies over it. Without the note it is as good."""
        if self.parent is not None:
            note_parent(self.parent, path)


@contextlib.contextmanager
def begun_image(path: str, new: NewImage, *, overwrite: bool, keeps: bool = False) -> Generator[BegunImage]:
    """What is to be made, once nothing speaks against it.

    What has one of the names already stays open and locked until the end, so that nobody begins to use it meanwhile.
    `keeps`: the disk stays as it is made, so its file may be one that is there and is kept.
    """
    location = locate(path)
    found = format_named(new.format)
    if location.in_memory != has_trait(found, Trait.IN_MEMORY):
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            "a RAM disk has the format ram and a name like ram:NAME",
            path=path,
            op="create",
        )
    if not isinstance(found, CreatableFormat):
        raise ImageError(ErrorKind.UNSUPPORTED, f"tapfs does not make {new.format} images", path=path, op="create")
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(target_at(location))
        request, parent = stack.enter_context(create_request(path, new))
        plan = found.create(request)
        further = tuple(found.further_names(request)) if isinstance(found, MultiFileFormat) else ()
        repeated = next((name for at, name in enumerate(further) if name in (request.name, *further[:at])), None)
        if repeated is not None:
            raise ImageError(
                ErrorKind.EXISTS,
                f"two files of the new image would have the name {repeated}",
                path=path,
                op="create",
                remedy="choose another name for one of them",
            )
        targets = [target, *(stack.enter_context(target.beside(name)) for name in further)]
        if new.backing is not None and any(each.is_there for each in targets):
            _refuse_own_chain(path, new.backing, new.backing_format, targets)
        kept = frozenset(found.kept_names(request)) if isinstance(found, KeepingFormat) else frozenset[str]()
        if kept and not keeps:
            message = f"{', '.join(kept)} is to be kept, and would be overwritten"
            raise ImageError(ErrorKind.UNSUPPORTED, message, path=path, op="create", remedy="let tapfs create make it")
        held = [
            _kept(each, stack)
            if each.name in kept
            else _held(each, new, request.virtual_size, stack, overwrite=overwrite)
            for each in targets
        ]
        files = stack.enter_context(NewFiles(targets, held, kept))
        on_device = held[0] is not None and held[0].is_block_device
        yield BegunImage(files, further, plan, request.virtual_size, on_device, parent)


def _refuse_own_chain(path: str, backing: str, backing_format: str | None, targets: Sequence[Target]) -> None:
    """Raise ImageError(exists) if a file to be replaced is the parent of the new image, or a file below that."""
    parent = locate_parent(path, stored_parent(backing)).name
    below = files_below(parent, OpenOptions(format=backing_format))
    if any(target.identity() in below for target in targets):
        raise ImageError(
            ErrorKind.EXISTS,
            f"is {backing}, which the new image is to be an overlay over, or a file below that",
            path=path,
            op="create",
            remedy="choose another name for the new image",
        )


def _held(
    target: Target, new: NewImage, size: int, stack: contextlib.ExitStack, *, overwrite: bool
) -> LocalFile | None:
    """What has the target's name already, open and locked, if it may be replaced."""
    if not target.is_there:
        return None
    held = stack.enter_context(contextlib.closing(target.open()))
    if held.is_block_device:
        _check_device(held, new, size, overwrite=overwrite)
    elif held.size() > 0 and not overwrite:
        raise _exists(target.path, "exists and is not empty")
    _refuse_base(held)
    return held


def _kept(target: Target, stack: contextlib.ExitStack) -> LocalFile:
    """The file that stays as it is and becomes a part of the image, open and locked."""
    if not target.is_there:
        raise ImageError(ErrorKind.NOT_FOUND, "is to be kept, and does not exist", path=target.path, op="create")
    target.refuse_another_s()
    held = stack.enter_context(contextlib.closing(target.open()))
    _refuse_base(held)
    return held


def _refuse_base(held: LocalFile) -> None:
    """Raise ImageError if an image lies over the file."""
    try:
        refuse_written_base(held, lambda overlay: files_below(overlay, OpenOptions()))
    except ImageError as error:
        error.remedy = "choose another name, or remove it first"
        raise


def open_filled(path: str, new: NewImage, begun: BegunImage) -> Image:
    """Execute the creation plan on the new files and open the image in them."""
    opened = begun.files.open()
    files = files_of_image(opened, begun.further)
    try:
        if not begun.on_device:
            _execute(opened, begun.plan)
    except BaseException:
        files.close()
        raise
    return open_created(path, new, files, Image)


def _open_finished(path: str, new: NewImage, begun: BegunImage) -> Image:
    """The image in the files that were filled, as any reader opens it."""
    return open_created(path, new, files_of_image(begun.files.open(), begun.further), Image, finished=True)


def files_of_image(opened: Sequence[LocalFile], further: Sequence[str]) -> LocalFiles:
    """The files of a new image, of which those after the first have these names."""
    image, *others = opened
    return LocalFiles(image, given=dict(zip(further, others, strict=True)))


def open_created(path: str, new: NewImage, files: LocalFiles, kind: type[_Image], *, finished: bool = False) -> _Image:
    """The new, empty image in files on which its plan was executed, open for writing; they are taken over.

    One that is `finished` is filled, and opened for reading.
    """
    formats = () if new.backing_format is None else (new.backing_format,)
    options = OpenOptions(format=new.format, writable=not finished, backing_formats=formats, created=not finished)
    layer = layer_of_files(path, files, options)
    reference = layer.driver.geometry.backing
    if new.backing is not None and reference is not None and reference.search is not None:
        options = replace(options, backing=locate_parent(path, stored_parent(new.backing)).name)
    return open_kind_on(kind, layer, options, password=new.password)


def _execute(files: Sequence[LocalFile], plan: Plan) -> None:
    from tapfs.kernel.engine import HostDescriptor, execute_on_files  # importing this module needs no engine

    execute_on_files([HostDescriptor(file.descriptor, file.path, writable=True) for file in files], plan)


@contextlib.contextmanager
def create_request(path: str, new: NewImage) -> Generator[tuple[CreateRequest, LocalFile | None]]:
    """What is asked of the format, and the file of the parent, if there is one, which is open meanwhile."""
    with contextlib.ExitStack() as stack:
        parent = None
        if new.backing is not None:
            options = OpenOptions(format=new.backing_format, say_raw="say {parent_format=raw}")
            parent = open_layer(locate_parent(path, stored_parent(new.backing)).name, options)
            stack.callback(parent.close)
        size = new.size
        if size is None and parent is not None:
            size = parent.driver.geometry.virtual_size
        if size is None:
            raise ImageError(ErrorKind.OUT_OF_BOUNDS, "needs a size", path=path, op="create")
        if size > MAX_DISK_BYTES:
            raise ImageError(
                ErrorKind.OUT_OF_BOUNDS,
                f"a disk of {size} bytes is too large: tapfs serves at most {MAX_DISK_BYTES} bytes",
                path=path,
                op="create",
            )
        request = CreateRequest(
            virtual_size=size,
            backing=None if new.backing is None else BackingReference(stored_parent(new.backing), new.backing_format),
            backing_mtime=0 if parent is None else parent.file.modified_seconds(),
            options=new.options,
            encrypted=new.password is not None,
            password=password_of(new.password, [path]),
            cryptography=None if new.password is None else _cryptography(path),
            name=os.path.basename(path),
            parent=None if parent is None else parent.driver,
            compressed=new.compressed,
        )
        yield request, None if parent is None else parent.file


def _cryptography(path: str) -> Cryptography:
    from tapfs.kernel.cryptography import EngineCryptography  # few images are encrypted

    return EngineCryptography(path)


def _check_device(device: LocalFile, new: NewImage, size: int, *, overwrite: bool) -> None:
    """Refuse a device that cannot be the image, or that holds something unless told to replace that."""
    path = device.path
    if not has_trait(format_named(new.format), Trait.ON_DEVICE):
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            f"a block device cannot hold a growing {new.format} image",
            path=path,
            op="create",
            remedy="choose raw, whose length is that of the disk, or a file as the target",
        )
    capacity = device.size()
    if size > capacity:
        raise ImageError(
            ErrorKind.OUT_OF_BOUNDS, f"the device has {capacity} bytes, not {size}", path=path, op="create"
        )
    if overwrite:
        return
    # Partition tables, file systems, volume managers and RAIDs all leave their mark at one of the ends.
    for start in (0, max(0, capacity - _DEVICE_END_BYTES)):
        content = device.read(start, _DEVICE_END_BYTES)
        if content.count(0) != len(content):
            at = start + len(content) - len(content.lstrip(b"\0"))
            raise _exists(path, f"the device is not blank: there is data at byte {at:#x}")


def _exists(path: str, message: str) -> ImageError:
    return ImageError(ErrorKind.EXISTS, message, path=path, op="create", remedy="say {force} to replace it")
