"""Change the image that a server serves, while the server runs: put an overlay on it, give it another length.

Every front end does it with this code, for a guest's disk as for an NBD or vhost-user disk. A `Geometry` holds for one
opening of an image. Who resizes or reverts the image therefore opens the same open files anew. The new `Image` is the
next generation. The front end swaps the new `Image` in while nobody writes, and then abandons the old one. The files
stay open throughout, so no moment comes at which another process could take their locks.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from tapfs.disk.chain import MAX_DEPTH, Layer, OpenOptions, layer_of_files
from tapfs.disk.image import Image
from tapfs.disk.opening import open_image_on
from tapfs.disk.overlay import open_over
from tapfs.disk.plain_disk import is_plain
from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.extent import Kind
from tapfs.host.file import LocalFile, SecondUse
from tapfs.host.files import LocalFiles
from tapfs.host.lock import Sharing, only_read_from_now_on, refuse_as, refuse_other_writers, refuse_writers
from tapfs.records import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tapfs.disk.plan_log import PlanLog

#: Bytes of a sector. Every served disk is a whole number of them.
SECTOR = 512


def written_by_others(image: Image) -> ImageError | None:
    """The error that names who else writes the image, for a warning where that is not refused."""
    top = image.layers[0]
    try:
        refuse_other_writers(top.file.descriptor, top.path)
    except ImageError as error:
        return error
    return None


def refuse_others(image: Image) -> None:
    """Let nobody else write a served image from now on. Raises ImageError(locked), and then those who do may go on."""
    top = image.layers[0]
    for file in top.files:
        refuse_writers(file.descriptor, refused=True)
    # Whoever comes later is refused.
    refuse_other_writers(top.file.descriptor, top.path)


def let_others_in(image: Image, sharing: Sharing) -> None:
    """Have others use a served image beside us as `sharing` says."""
    for file in image.layers[0].files:
        refuse_as(file.descriptor, writable=image.writable, sharing=sharing)


class Overlaid(NamedTuple):
    """An overlay that is open over a served image but does not serve yet. `made`: it is new."""

    layer: Layer
    made: bool

    def discard(self) -> None:
        """Close it, and remove it if it was made for this."""
        with suppress(OSError):
            if self.made:
                self.layer.file.unlink()
        self.layer.close()


def overlay_on(image: Image, path: str, size: int | None) -> Overlaid:
    """The overlay `path` over a served image, made unless it is there, empty, with that image as its parent.

    Nobody else writes the image. Raises ImageError: exists, out_of_bounds (it is smaller than the disk).
    """
    if size is not None:
        size_of_overlay(image, path, size)
    overlaid = Overlaid(*open_over(image.layers, path, size=size))
    found = overlaid.layer.driver.geometry.virtual_size
    if found < image.size or (size is not None and found != size):
        overlaid.discard()
        raise _too_small(path, found, image.size if size is None else size)
    extents = overlaid.layer.driver.map(0, found)
    if not overlaid.made and any(extent.kind is not Kind.UNALLOCATED for extent in extents):
        overlaid.discard()
        raise ImageError(
            ErrorKind.EXISTS,
            "has been written to as an overlay: what is in it would appear in the disk that the guest uses",
            path=path,
            op="swap",
            remedy="name a new file",
        )
    return overlaid


def require_room_in_chain(image: Image) -> None:
    """Raise ImageError(unsupported) if an overlay over the image would make a chain that nobody could open."""
    if len(image.layers) >= MAX_DEPTH:
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            f"has {len(image.layers)} images in its chain, and no more than {MAX_DEPTH} are opened",
            path=image.path,
            op="swap",
            remedy="commit it first, which makes the chain shorter",
        )


def size_of_overlay(image: Image, path: str, size: int | None) -> int:
    """The bytes of a new overlay over a served image. Raises ImageError(out_of_bounds) for less than the disk."""
    if size is None:
        return image.size
    _check_size(size, path)
    if size < image.size:
        raise _too_small(path, size, image.size)
    return size


def image_over(
    overlaid: Overlaid, image: Image, *, password: bytes | None, plan_log: PlanLog | None, exchanged: bool = False
) -> Image:
    """The overlay with all of a served image below it, which is flushed and will not be written any more.

    `exchanged`: the two are to have each other's name. Guest data goes past the page cache where it did before.
    The image stays as it is; both must not be written at once. Raises ImageError; the overlay is open then.
    """
    names = [overlaid.layer.path, *(layer.path for layer in image.layers)]
    if exchanged:
        names[:2] = names[1::-1]
    with ExitStack() as on_error:
        below: list[Layer] = []
        for layer, name in zip(image.layers, names[1:], strict=True):
            below.append(once_more(layer, name, writable=False, direct=layer.file.direct))
            on_error.callback(below[-1].close)
        direct = image.layers[0].file.direct
        top = once_more(overlaid.layer, names[0], writable=True, direct=direct, sharing=Sharing.EXCLUSIVE)
        on_error.callback(top.close)
        layers = [top, *below]
        opened = Image(layers, writable=True, password=password, cache_bytes=image.cache_bytes, plan_log=plan_log)
        _ = opened.engine_disk  # what cannot be served is to be known now
        on_error.pop_all()
    return opened


def snapshot_of(layers: Sequence[Layer], name: str, *, password: bytes | None, cache_bytes: int) -> Image:
    """A snapshot of the first of these open layers, with the others below it; they stay as they are.

    The Image is read-only, and is closed by itself. The first layer may be written meanwhile: what a snapshot shares
    is never written in place. Raises ImageError.
    """
    with ExitStack() as on_error:
        opened: list[Layer] = []
        for depth, layer in enumerate(layers):
            wanted = name if depth == 0 else None
            opened.append(once_more(layer, writable=False, direct=layer.file.direct, snapshot=wanted))
            on_error.callback(opened[-1].close)
        image = Image(opened, writable=False, password=password, cache_bytes=cache_bytes)
        on_error.pop_all()
    return image


def let_others_read(image: Image) -> None:
    """Give up the writer's locks of what lies below an overlay now, so that it can be copied away."""
    for layer in image.layers[1:]:
        for file in layer.files:
            only_read_from_now_on(file.descriptor)


def resized(image: Image, size: int | None, *, force: bool) -> Image:
    """A raw image or RAM disk at another length, or (size None) at the length that its file has now.

    Nobody may be writing. The old Image is good for nothing but to be abandoned afterwards; if an ImageError is
    raised it is still good. The new length is durable.
    """
    top = image.layers[0]
    if not is_plain(top.driver):
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            f"a {top.driver.format_name} image cannot be resized while it is served",
            path=top.path,
            op="resize",
            remedy="put a larger overlay on it (tapfs swap --size), or resize it while nobody serves it",
        )
    wanted = top.file.size() if size is None else size
    if wanted < image.size and not force:
        raise ImageError(
            ErrorKind.OUT_OF_BOUNDS,
            f"{wanted} bytes are fewer than the {image.size} that the disk has: what lies behind them would be lost",
            path=top.path,
            op="resize",
            remedy="say {force} if that is meant",
        )
    _check_size(wanted, top.path)
    if size is not None:
        _set_length(image, size)
    writable = image.writable
    layer = once_more(top, writable=writable, direct=top.file.direct)
    options = OpenOptions(format=layer.driver.format_name, writable=writable, cache_bytes=image.cache_bytes)
    opened = open_image_on(layer, options, password=None)
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


def once_more(
    layer: Layer,
    path: str | None = None,
    *,
    writable: bool,
    direct: bool,
    sharing: Sharing = Sharing.UNCHECKED,
    snapshot: str | None = None,
) -> Layer:
    """The same open files, and their locks, as another layer: read anew, closed by itself.

    `path` is the name that the image has then, None for the one that it has. Whether it may be written was asked when
    it was opened. `snapshot` is the disk inside the image that the layer is to be, None the current one.
    """
    path = layer.path if path is None else path
    options = OpenOptions(format=layer.driver.format_name, writable=writable, write_base=True, snapshot=snapshot)
    files = on_the_same_files(layer, path, writable=writable, direct=direct, sharing=sharing)
    return layer_of_files(path, files, options)


def on_the_same_files(
    layer: Layer,
    path: str | None = None,
    *,
    writable: bool,
    direct: bool,
    sharing: Sharing = Sharing.UNCHECKED,
) -> LocalFiles:
    """The files of a layer on descriptors of their own, with the same locks."""
    path = layer.path if path is None else path
    with ExitStack() as on_error:
        opened: list[LocalFile] = []
        for number, file in enumerate(layer.files):
            called = path if number == 0 else file.path
            twin = file.again(SecondUse(called, writable=writable, direct=direct, sharing=sharing))
            on_error.callback(twin.close)
            opened.append(twin)
        given = {name: opened[number] for name, number in layer.files.names.items()}
        on_error.pop_all()
    return layer.files.again(given, opened[0])


def _check_size(size: int, path: str) -> None:
    if size < SECTOR or size % SECTOR:
        raise ImageError(
            ErrorKind.OUT_OF_BOUNDS, f"a disk of {size} bytes is no whole number of sectors", path=path, op="resize"
        )


def _too_small(path: str, size: int, least: int) -> ImageError:
    return ImageError(
        ErrorKind.OUT_OF_BOUNDS, f"an overlay of {size} bytes cannot hold a disk of {least}", path=path, op="swap"
    )
