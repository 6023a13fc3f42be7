"""Change the size of an image that nobody uses.

A disk grows in three steps: the image gets room, what is behind the old end and does not read as zeros is zeroed, and
the size is told (`tapfs.edit_protocols.Resizable`). The second step is a write like any other, by a driver that takes
the disk for as long as it is to be. So it works for whatever stands there: bytes of a disk that was longer once,
clusters that are packed, encrypted or shared with a snapshot, and a parent that is longer than the disk.

An encrypted disk that is a part of a file as it stands (LUKS) has no field for its size: the file's length is the size.
It grows by zeros that are encrypted and appended, so a crash may leave a length in between, which reads as zeros.

After a shrink the end of the last granule, which the disk has no more, is zeroed where the image itself holds it. So
who grows the image without a look at it shows no bytes of the longer disk.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from itertools import islice

from tapfs.disk.chain import Layer, OpenOptions, open_layer
from tapfs.disk.image import Image
from tapfs.disk.opening import open_image
from tapfs.driver import MAX_DISK_BYTES, Preallocating, Resizable
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Range
from tapfs.jobs.editing import edit_image
from tapfs.jobs.zero_data import write_zero_data
from tapfs.plan import Allocate, Plan, plan
from tapfs.records import dataclass, replace

#: So many extents of the map are looked at before what they say is acted upon.
_EXTENTS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The size of a disk now and the one that it is to have, in bytes."""

    now: int
    size: int
    identity: bool
    #: The disk is encrypted and as long as its file.
    appended: bool
    #: The end of the last granule of the disk that is to be.
    granule_end: int
    preallocations: tuple[str, ...]


def resize_image(
    path: str,
    wanted: Callable[[int], int],
    options: OpenOptions,
    *,
    shrink: bool = False,
    preallocation: str = "off",
    password: bytes | None = None,
) -> int:
    """Give an image the size that `wanted` makes of its size now, in bytes; the result is that size.

    `options` say how it is opened, and where its parents are: a parent that is longer than the disk must not show in
    what is added. The new size is durable when this returns; a crash before leaves the old one or the new one.
    `preallocation` says how what is added gets its space, after the new size is durable: "falloc" has the host
    reserve it, "full" writes zeros, "metadata" gives each cluster its place (`tapfs.driver.Preallocating`).
    Raises ImageError: unsupported for what the format cannot do, out_of_bounds for a smaller size without `shrink`.
    """
    options = replace(options, writable=True)
    found = _looked_at(path, wanted, options, shrink=shrink)
    if preallocation != "off":
        _require_room_for(preallocation, found, path)
    if found.size == found.now:
        return found.size
    grown = replace(options, grown_size=max(found.size, found.granule_end))
    if found.size > found.now:
        edit_image(path, options, lambda layer: _resizable(layer, found).make_room(found.size))
        if found.appended:
            with contextlib.closing(open_image(path, grown, password=password)) as image:
                write_zero_data(image, Range(found.now, found.size - found.now))
            return found.size
        if not found.identity:
            _zero_behind(path, replace(options, grown_size=found.size), found.now, password)
    edit_image(path, options, lambda layer: _resizable(layer, found).resize(found.size))
    if found.size < found.now and not found.identity:
        _zero_cut(path, grown, found.size, password)
    if preallocation != "off":
        _fill_behind(path, options, found, preallocation, password)
    with contextlib.closing(open_layer(path, replace(options, writable=False))) as layer:
        return layer.driver.geometry.virtual_size


def _looked_at(path: str, wanted: Callable[[int], int], options: OpenOptions, *, shrink: bool) -> _Wanted:
    """What is to be done, once nothing speaks against it."""
    with contextlib.closing(open_layer(path, options)) as layer:
        now = layer.driver.geometry.virtual_size
        size = wanted(now)
        if size < 0:
            raise ImageError(ErrorKind.OUT_OF_BOUNDS, f"cannot lose more than its {now} bytes", path=path, op="resize")
        if size > MAX_DISK_BYTES:
            message = f"a disk of {size} bytes is too large: tapfs serves at most {MAX_DISK_BYTES} bytes"
            raise ImageError(ErrorKind.OUT_OF_BOUNDS, message, path=path, op="resize")
        if layer.file.is_block_device:
            raise ImageError(
                ErrorKind.UNSUPPORTED,
                "is a block device",
                path=path,
                op="resize",
                remedy="resize it by its own means (lvextend and the like)",
            )
        if not isinstance(layer.driver, Resizable):
            raise _unsupported(layer, size)
        if size < now and not shrink:
            raise ImageError(
                ErrorKind.OUT_OF_BOUNDS,
                f"{size} bytes are fewer than its {now}: what lies behind them would be lost",
                path=path,
                op="resize",
                remedy="say {shrink} if that is meant",
            )
        geometry = layer.driver.geometry
        identity = geometry.identity is not None
        own = layer.driver.preallocations if isinstance(layer.driver, Preallocating) else ()
        return _Wanted(
            now,
            size,
            identity,
            identity and geometry.cipher is not None,
            min(now, -(-size // geometry.packed_unit) * geometry.packed_unit),
            ("falloc", "full") if identity else own or ("full",),
        )


def _unsupported(layer: Layer, size: int) -> ImageError:
    """The error of a format whose images keep their size, with what its user can do instead."""
    name = layer.driver.format_name
    if size > layer.driver.geometry.virtual_size:
        remedy = f"make an overlay of that size: tapfs create -f qcow2 -b {layer.path} -F {name} NEW {size}"
    else:
        remedy = f"convert it, and resize what that makes: tapfs convert -O qcow2 {layer.path} NEW"
    message = f"tapfs does not resize {name} images"
    return ImageError(ErrorKind.UNSUPPORTED, message, path=layer.path, op="resize", remedy=remedy)


def _resizable(layer: Layer, found: _Wanted) -> Resizable:
    """The driver of a layer that was opened once more. Raises ImageError(locked) if it changed meanwhile."""
    driver = layer.driver
    if not isinstance(driver, Resizable) or driver.geometry.virtual_size != found.now:
        raise ImageError(ErrorKind.LOCKED, "was changed by another process meanwhile", path=layer.path, op="resize")
    return driver


def _require_room_for(preallocation: str, found: _Wanted, path: str) -> None:
    if preallocation not in found.preallocations:
        allowed = " or ".join(("off", *found.preallocations))
        message = f"preallocation={preallocation}: what this image gains can have {allowed}"
        raise ImageError(ErrorKind.UNSUPPORTED, message, path=path, op="resize")
    if found.size < found.now:
        message = f"preallocation={preallocation} goes with a larger size only"
        raise ImageError(ErrorKind.OUT_OF_BOUNDS, message, path=path, op="resize")


def _fill_behind(path: str, options: OpenOptions, found: _Wanted, preallocation: str, password: bytes | None) -> None:
    """Take the space of what was added; a crash leaves the disk as long as it is to be, and it reads the same."""
    if len(found.preallocations) > 1 and not found.identity:
        edit_image(path, options, lambda layer: _preallocation(layer, preallocation, found), keeps_disk=True)
        return
    with contextlib.closing(open_image(path, options, password=password)) as image:
        identity = image.layers[0].driver.geometry.identity
        if preallocation == "falloc" and identity is not None:
            start = identity.host_offset + found.now
            image.engine_disk.execute(plan([Allocate(identity.file, start, found.size - found.now)]))
            return
        write_zero_data(image, Range(found.now, found.size - found.now))


def _preallocation(layer: Layer, mode: str, found: _Wanted) -> Iterator[Plan]:
    if not isinstance(layer.driver, Preallocating):
        raise ImageError(ErrorKind.LOCKED, "was changed by another process meanwhile", path=layer.path, op="resize")
    return layer.driver.preallocate(mode, found.now, layer.driver.geometry.virtual_size)


def _zero_cut(path: str, grown: OpenOptions, start: int, password: bytes | None) -> None:
    """Zero what the top image still holds of its last granule behind `start`, where that can still be reached.

    Without a key it cannot, nor in an image that says in several places how long it is (VMDK), nor in a data file,
    which was cut with the disk. The size is durable already, so none of these is an error.
    """
    try:
        with contextlib.closing(open_image(path, grown, password=password, metadata_only=True)) as image:
            left = [each for each in image.extents(start) if each.depth == 0 and not each.zero]
            for each in [] if image.needs_password else left:
                image.write_zeroes(each.offset, each.length)
    except ImageError as error:
        if error.kind is not ErrorKind.CORRUPT:
            raise


def _zero_behind(path: str, options: OpenOptions, start: int, password: bytes | None) -> None:
    """Zero what does not read as zeros behind `start`, in an image that is opened as long as it is to be."""
    with contextlib.closing(open_image(path, options, password=password, metadata_only=True)) as image:
        for each in _not_zero(image, start):
            image.write_zeroes(each.offset, each.length)


def _not_zero(image: Image, at: int) -> Iterator[Range]:
    """The ranges from `at` on that do not read as zeros, widened to granules, one behind the other."""
    unit = image.layers[0].driver.geometry.packed_unit
    start = at
    while at < image.size:
        looked = list(islice(image.extents(at), _EXTENTS_AT_ONCE))
        for extent in looked:
            end = extent.offset + extent.length
            if not extent.zero and end > start:
                low = max(start, extent.offset // unit * unit)
                start = min(image.size, -(-end // unit) * unit)
                yield Range(low, start - low)
        at = max(looked[-1].offset + looked[-1].length, start)
