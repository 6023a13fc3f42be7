"""Change the size of an image that nobody uses."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

from tapfs.disk.chain import Layer, OpenOptions, open_layer
from tapfs.disk.plain_disk import is_plain
from tapfs.errors import ErrorKind, ImageError, from_os_error


def resize_image(path: str, wanted: Callable[[int], int], *, format_name: str | None, shrink: bool) -> int:
    """Give an image the size that `wanted` makes of its size now, in bytes; the result is that size.

    The new size is durable when this returns; a crash before leaves the old one or the new one. Raises ImageError:
    unsupported for a format without this, out_of_bounds for a smaller size without `shrink`.
    """
    layer = open_layer(path, OpenOptions(format=format_name, writable=True))
    with contextlib.closing(layer.file):
        now = layer.driver.geometry.virtual_size
        size = wanted(now)
        _require_resizable(layer, size)
        if size < 0:
            raise ImageError(ErrorKind.OUT_OF_BOUNDS, f"cannot lose more than its {now} bytes", path=path, op="resize")
        if size < now and not shrink:
            raise ImageError(
                ErrorKind.OUT_OF_BOUNDS,
                f"{size} bytes are fewer than its {now}: what lies behind them would be lost",
                path=path,
                op="resize",
                remedy="say {shrink} if that is meant",
            )
        if size != now:
            _set_length(layer, size)
    return size


def _require_resizable(layer: Layer, size: int) -> None:
    if layer.file.is_block_device:
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            "is a block device",
            path=layer.path,
            op="resize",
            remedy="resize it by its own means (lvextend and the like)",
        )
    if not is_plain(layer.driver):
        name = layer.driver.format_name
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            f"tapfs does not resize {name} images; it resizes raw ones",
            path=layer.path,
            op="resize",
            remedy=f"make an overlay of that size: tapfs create -f qcow -b {layer.path} -F {name} NEW {max(size, 0)}",
        )


def _set_length(layer: Layer, size: int) -> None:
    try:
        os.ftruncate(layer.file.descriptor, size)
        os.fsync(layer.file.descriptor)
    except OverflowError as error:
        raise ImageError(
            ErrorKind.OUT_OF_BOUNDS, f"{size} bytes are more than a file can have", path=layer.path, op="resize"
        ) from error
    except OSError as error:
        raise from_os_error(error, path=layer.path, op="resize the image") from error
