"""Opening the image of a guest's disk, by its mode, and opening it once more while it is served.

Mode r refuses only those who write alone, w is such a writer, w! bears anybody (tapfs/host/lock.py). What is served
already is opened again on the same open file, so no moment comes at which another could take its lock.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, NamedTuple

from tapfs.disk.chain import Layer, OpenOptions, layer_of_files
from tapfs.disk.image import Image
from tapfs.disk.opening import complete_left, open_image, open_image_on
from tapfs.disk.overlay import open_over
from tapfs.disk.password import given_password
from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.extent import Kind
from tapfs.host.file import LocalFile
from tapfs.host.lock import Sharing, only_read_from_now_on, refuse_other_writers
from tapfs.serving.log import log
from tapfs.xen.specification import DiskSpecification

if TYPE_CHECKING:
    from tapfs.disk.plan_log import PlanLog
    from tapfs.xen.disk.settings import DiskSettings

SECTOR = 512

_SHARING = {"r": Sharing.WITH_SHARERS, "w": Sharing.ALONE, "w!": Sharing.ANYBODY}


def open_disk(settings: DiskSettings, plan_log: PlanLog) -> Image:
    """The image of a disk, first mended by the plan that a killed predecessor has left. Raises ImageError."""
    specification, mode = settings.specification, settings.mode
    options = OpenOptions(
        format=specification.format,
        writable=mode != "r",
        backing_formats=settings.backing_formats,
        direct=specification.direct,
        disk=plan_log.disk,
        sharing=_SHARING[mode],
        say_raw=f"attach tap:aio:{specification.path}, or say -f raw,",
    )
    try:
        if complete_left(specification.path, options, plan_log):
            log.info("completed what the last process had acknowledged")
        password = given_password(settings.key_file)
        image = open_image(specification.path, options, password=password, plan_log=plan_log)
    except ImageError as error:
        if error.kind is ErrorKind.LOCKED and (error.remedy or "").startswith("end that use"):
            error.remedy = "end that use first, or attach it with mode w! in every place (both must bear it)"
        raise
    if image.size < SECTOR:
        image.close()
        raise ImageError(ErrorKind.OUT_OF_BOUNDS, "is no disk: it has not one sector", path=image.path, op="open")
    return image


def written_by_others(image: Image) -> ImageError | None:
    """The error that names who else writes the image, for a warning where that is not refused."""
    top = image.layers[0]
    try:
        refuse_other_writers(top.file.descriptor, top.path)
    except ImageError as error:
        return error
    return None


class Overlaid(NamedTuple):
    """An overlay that is open over a served image but does not serve yet. `made`: it is new."""

    layer: Layer
    made: bool

    def forsake(self) -> None:
        """Close it, and remove it if it was made for this."""
        with suppress(OSError):
            if self.made:
                self.layer.file.unlink()
        self.layer.close()


def overlay_on(image: Image, path: str, size: int | None) -> Overlaid:
    """The overlay `path` over a served image, made unless it is there, empty, with that image as its parent.

    Raises ImageError: exists, locked (others write the image), out_of_bounds (it is smaller than the disk).
    """
    top = image.layers[0]
    refuse_other_writers(top.file.descriptor, top.path)
    if size is not None:
        _check_size(size, path)
        if size < image.size:
            raise _too_small(path, size, image.size)
    overlaid = Overlaid(*open_over(image.layers, path, size=size))
    found = overlaid.layer.driver.geometry.virtual_size
    if found < image.size or (size is not None and found != size):
        overlaid.forsake()
        raise _too_small(path, found, image.size if size is None else size)
    extents = overlaid.layer.driver.map(0, found)
    if not overlaid.made and any(extent.kind is not Kind.UNALLOCATED for extent in extents):
        overlaid.forsake()
        raise ImageError(
            ErrorKind.EXISTS,
            "has been written to as an overlay: what is in it would appear in the disk that the guest uses",
            path=path,
            op="swap",
            remedy="name a new file",
        )
    return overlaid


def image_over(overlaid: Overlaid, image: Image, *, password: bytes | None, plan_log: PlanLog) -> Image:
    """The overlay with all of a served image below it, which is flushed and will not be written any more.

    The image stays as it is; both must not be written at once. Raises ImageError; the overlay is open then.
    """
    with ExitStack() as on_error:
        below = [_once_more(layer, writable=False, direct=False) for layer in image.layers]
        for layer in below:
            on_error.callback(layer.close)
        top = _once_more(overlaid.layer, writable=True, direct=False, sharing=Sharing.ALONE)
        on_error.callback(top.close)
        opened = Image([top, *below], writable=True, password=password, plan_log=plan_log)
        _ = opened.engine_disk  # what cannot be served is to be known now
        on_error.pop_all()
    return opened


def let_others_read(image: Image) -> None:
    """Give up the writer's locks of what lies below an overlay now, so that it can be copied away."""
    for layer in image.layers[1:]:
        for file in layer.files:
            only_read_from_now_on(file.descriptor)


def specification_of(image: Image) -> tuple[str, str]:
    """What xenstore is to hold of an image: the disk string, and the formats of its parents, nearest first.

    A guest can write what looks like another format into its disk, so no parent's format is left to a guess.
    """
    top, *below = image.layers
    string = DiskSpecification(top.path, top.driver.format_name).absolute().params
    return string, ",".join(layer.driver.format_name for layer in below)


def resized(image: Image, size: int | None, *, force: bool) -> Image:
    """A raw image or RAM disk at another length, or (size None) at the length that its file has now.

    Nobody may be writing. The old Image is good for nothing but to be abandoned afterwards; if an ImageError is
    raised it is still good. The new length is durable.
    """
    top = image.layers[0]
    if not top.driver.geometry.identity:
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            f"a {top.driver.format_name} image cannot be resized while it is served",
            path=top.path,
            op="resize",
            remedy="put a larger overlay on it: tapfs swap --size",
        )
    wanted = top.file.size() if size is None else size
    if wanted < image.size and not force:
        raise ImageError(
            ErrorKind.OUT_OF_BOUNDS,
            f"{wanted} bytes are fewer than the {image.size} that the guest has: what lies behind them would be lost",
            path=top.path,
            op="resize",
            remedy="say --force if that is meant",
        )
    _check_size(wanted, top.path)
    if size is not None:
        _set_length(image, size)
    writable = image.writable
    layer = _once_more(top, writable=writable, direct=top.file.direct)
    opened = open_image_on(layer, OpenOptions(format=layer.driver.format_name, writable=writable), password=None)
    _ = opened.engine_disk
    return opened


def _set_length(image: Image, size: int) -> None:
    file = image.layers[0].file
    if file.is_block_device:
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            "is a block device",
            path=file.path,
            op="resize",
            remedy="resize it by its own means (lvextend), then say tapfs resize without a size",
        )
    if not image.writable:
        raise ImageError(ErrorKind.READ_ONLY, "was attached read-only", path=file.path, op="resize")
    if size == file.size():
        return
    try:
        os.ftruncate(file.descriptor, size)
        os.fsync(file.descriptor)
    except OSError as error:
        raise from_os_error(error, path=file.path, op="resize the image") from error


def _once_more(layer: Layer, *, writable: bool, direct: bool, sharing: Sharing = Sharing.ANYBODY) -> Layer:
    """The same open files, and their locks, as another layer: read anew, closed by itself."""
    options = OpenOptions(format=layer.driver.format_name, writable=writable)
    with ExitStack() as on_error:
        opened: list[LocalFile] = []
        for file in layer.files:
            again = LocalFile(
                file.path,
                os.dup(file.descriptor),
                writable=writable and file.writable,
                sharing=sharing,
                direct=direct,
                disk=file.disk,
                again=True,
            )
            on_error.callback(again.close)
            opened.append(again)
        given = {name: opened[number] for name, number in layer.files.names.items()}
        on_error.pop_all()
    return layer_of_files(layer.path, layer.files.again(given, opened[0]), options)


def _check_size(size: int, path: str) -> None:
    if size < SECTOR or size % SECTOR:
        raise ImageError(
            ErrorKind.OUT_OF_BOUNDS, f"a disk of {size} bytes is no whole number of sectors", path=path, op="resize"
        )


def _too_small(path: str, size: int, least: int) -> ImageError:
    return ImageError(
        ErrorKind.OUT_OF_BOUNDS, f"an overlay of {size} bytes cannot hold a disk of {least}", path=path, op="swap"
    )
