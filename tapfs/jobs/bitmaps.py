"""The bitmaps that an image keeps of what has changed: list, add, remove, clear, enable, disable and merge them.

A change is an edit of an image that nobody uses (`tapfs.jobs.editing`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial

from tapfs.disk.chain import Layer, OpenOptions, open_layer
from tapfs.driver import Bitmap, BitmapKeeper, Bitmapped
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Range
from tapfs.jobs.editing import edit_image
from tapfs.plan import Plan
from tapfs.records import NamedTuple


def list_bitmaps(path: str, options: OpenOptions) -> Sequence[Bitmap]:
    """The bitmaps of an image, in the order that it has them. Its parent is not opened. Raises ImageError."""
    with _opened(path, options) as (_, driver):
        return driver.bitmaps()


class ReadBitmap(NamedTuple):
    """A bitmap of a disk of `size` bytes, and the ranges that it marks: ascending, merged, read as they are wanted."""

    bitmap: Bitmap
    size: int
    ranges: Iterator[Range]


@contextlib.contextmanager
def read_bitmap(path: str, name: str, options: OpenOptions) -> Generator[ReadBitmap]:
    """A bitmap of an image, which stays open meanwhile. Raises ImageError(not_found), (corrupt) if inconsistent."""
    with _opened(path, options) as (layer, driver):
        ranges = driver.bitmap_ranges(name)
        bitmap = next(each for each in driver.bitmaps() if each.name == name)
        yield ReadBitmap(bitmap, layer.driver.geometry.virtual_size, ranges)


def add_bitmap(path: str, name: str, granularity: int | None, options: OpenOptions, *, enabled: bool = True) -> None:
    """Keep a new bitmap that marks nothing; `granularity` in bytes, None: a usual one. Raises ImageError."""
    _edit(path, options, lambda driver: driver.add_bitmap(name, granularity, enabled=enabled))


def add_marked_bitmap(path: str, bitmap: Bitmap, ranges: Sequence[Range], options: OpenOptions) -> None:
    """Keep a new bitmap as `bitmap` is, which marks these ranges from its first moment on. Raises ImageError."""
    _edit(path, options, partial(marked_bitmap, bitmap, ranges))


def marked_bitmap(bitmap: Bitmap, ranges: Sequence[Range], driver: BitmapKeeper) -> Iterator[Plan]:
    """The plans that have an image keep a new bitmap as `bitmap` is, which marks these ranges."""
    return driver.add_bitmap(bitmap.name, bitmap.granularity, enabled=bitmap.enabled, ranges=ranges)


def remove_bitmap(path: str, name: str, options: OpenOptions) -> None:
    """Forget a bitmap, which may be inconsistent. Raises ImageError."""
    _edit(path, options, lambda driver: driver.remove_bitmap(name))


def store_bitmap(path: str, name: str, ranges: Iterable[tuple[int, int]], options: OpenOptions) -> None:
    """Have a bitmap mark these ``(offset, length)`` and no others. Raises ImageError."""
    wanted = united((Range(offset, length) for offset, length in ranges if length > 0), ())
    if wanted and wanted[0].offset < 0:
        raise ImageError(
            ErrorKind.OUT_OF_BOUNDS, f"a range begins at {wanted[0].offset}", path=path, op="store a bitmap"
        )
    _edit(path, options, lambda driver: driver.store_bitmap(name, wanted))


def enable_bitmap(path: str, name: str, options: OpenOptions, *, enabled: bool) -> None:
    """Have a bitmap note what is written from now on, or not. Raises ImageError."""
    _edit(path, options, lambda driver: driver.enable_bitmap(name, enabled=enabled))


def merge_bitmap(
    path: str,
    name: str,
    source: str,
    options: OpenOptions,
    *,
    source_path: str | None = None,
    source_options: OpenOptions | None = None,
) -> None:
    """Have a bitmap also mark what `source` marks: a bitmap of the same image, or of that at `source_path`.

    The other image is only read, and its disk has the same size. Raises ImageError.
    """
    if source_path is None:
        _edit(path, options, lambda driver: _merged(driver, name, source))
        return
    with read_bitmap(source_path, source, source_options or OpenOptions()) as other:
        ranges = list(other.ranges)

    def merge(driver: BitmapKeeper) -> Iterator[Plan]:
        size = driver.geometry.virtual_size
        if other.size != size:
            message = f"a bitmap of a disk of {other.size} bytes does not fit a disk of {size} bytes"
            raise ImageError(ErrorKind.INVALID_ARGUMENT, message, path=path, op="merge bitmaps")
        return driver.store_bitmap(name, united(driver.bitmap_ranges(name), ranges))

    _edit(path, options, merge)


def _edit(path: str, options: OpenOptions, edit: Callable[[BitmapKeeper], Iterator[Plan]]) -> None:
    edit_image(path, options, lambda layer: edit(keeper(layer)), keeps_disk=True)


def keeper(layer: Layer) -> BitmapKeeper:
    """The driver of an image that can keep bitmaps. Raises ImageError(unsupported)."""
    if not isinstance(layer.driver, BitmapKeeper):
        raise _without_bitmaps(layer)
    return layer.driver


def united(first: Iterable[Range], second: Iterable[Range]) -> list[Range]:
    """The bytes that are in either of two series of ascending ranges, as merged ranges."""
    found: list[Range] = []
    for offset, length in sorted([*first, *second]):
        if found and offset <= found[-1].end:
            last = found.pop()
            offset, length = last.offset, max(last.end, offset + length) - last.offset  # noqa: PLW2901 - the two as one
        found.append(Range(offset, length))
    return found


def _merged(driver: BitmapKeeper, name: str, source: str) -> Iterator[Plan]:
    return driver.store_bitmap(name, united(driver.bitmap_ranges(name), driver.bitmap_ranges(source)))


@contextlib.contextmanager
def _opened(path: str, options: OpenOptions) -> Generator[tuple[Layer, Bitmapped]]:
    with contextlib.closing(open_layer(path, options)) as layer:
        if not isinstance(layer.driver, Bitmapped):
            raise _without_bitmaps(layer)
        yield layer, layer.driver


def _without_bitmaps(layer: Layer) -> ImageError:
    message = f"{layer.driver.format_name} images keep no bitmaps"
    return ImageError(ErrorKind.UNSUPPORTED, message, path=layer.path, op="bitmap")
