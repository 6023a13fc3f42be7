"""Change the size of an image that nobody uses.

A disk grows in three steps: the image gets room, what is behind the old end and does not read as zeros is zeroed, and
the size is told (`tapfs.edit_protocols.Resizable`). The second step is a write like any other, by a driver that takes
the disk for as long as it is to be. So it works for whatever stands there: bytes of a disk that was longer once,
clusters that are packed, encrypted or shared with a snapshot, and a parent that is longer than the disk.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

from tapfs.disk.chain import Layer, OpenOptions, open_layer
from tapfs.disk.image import Image
from tapfs.disk.opening import open_image
from tapfs.driver import MAX_DISK_BYTES, Resizable
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Range
from tapfs.jobs.editing import edit_image
from tapfs.jobs.zero_data import write_zero_data
from tapfs.plan import Allocate, plan

#: So many extents of the map are looked at before what they say is acted upon.
_EXTENTS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The size of a disk now and the one that it is to have, in bytes."""

    now: int
    size: int
    identity: bool


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
    reserve it where the disk lies in a file as it stands, "full" writes zeros.
    Raises ImageError: unsupported for what the format cannot do, out_of_bounds for a smaller size without `shrink`.
    """
    options = replace(options, writable=True)
    found = _looked_at(path, wanted, options, shrink=shrink)
    if preallocation != "off":
        _require_room_for(preallocation, found, path)
    if found.size == found.now:
        return found.size
    if found.size > found.now:
        edit_image(path, options, lambda layer: _resizable(layer, found).make_room(found.size))
        if not found.identity:
            _zero_behind(path, replace(options, grown_size=found.size), found.now, password)
    edit_image(path, options, lambda layer: _resizable(layer, found).resize(found.size))
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
        return _Wanted(now, size, layer.driver.geometry.identity is not None)


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
    allowed = ("falloc", "full") if found.identity else ("full",)
    if preallocation not in allowed:
        message = f"preallocation={preallocation}: what this image gains can have off or {' or '.join(allowed)}"
        raise ImageError(ErrorKind.UNSUPPORTED, message, path=path, op="resize")
    if found.size < found.now:
        message = f"preallocation={preallocation} goes with a larger size only"
        raise ImageError(ErrorKind.OUT_OF_BOUNDS, message, path=path, op="resize")


def _fill_behind(path: str, options: OpenOptions, found: _Wanted, preallocation: str, password: bytes | None) -> None:
    """Take the space of what was added; a crash leaves the disk as long as it is to be, and it reads the same."""
    with contextlib.closing(open_image(path, options, password=password)) as image:
        identity = image.layers[0].driver.geometry.identity
        if preallocation == "falloc" and identity is not None:
            start = identity.host_offset + found.now
            image.engine_disk.execute(plan([Allocate(identity.file, start, found.size - found.now)]))
            return
        write_zero_data(image, Range(found.now, found.size - found.now))


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
