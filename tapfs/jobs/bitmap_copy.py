"""Copy the bitmaps of an image into the image that its disk was copied to."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from tapfs.disk.chain import OpenOptions
from tapfs.disk.image import Image
from tapfs.disk.live import once_more
from tapfs.driver import Bitmap, BitmapKeeper, Bitmapped
from tapfs.errors import ErrorKind, ImageError
from tapfs.jobs.bitmaps import add_marked_bitmap, keeper, marked_bitmap
from tapfs.plan import Plan
from tapfs.records import NamedTuple

_OP = "copy the bitmaps"


class CopiedBitmaps(NamedTuple):
    """The bitmaps of an open image that are to be copied; `skipped` are the names of those that are inconsistent."""

    source: Bitmapped
    bitmaps: Sequence[Bitmap]
    skipped: Sequence[str]

    def kept_by(self, target: Image) -> bool:
        """Whether an image can keep bitmaps."""
        return isinstance(target.layers[0].driver, BitmapKeeper)

    def require_kept(self, target: Image) -> None:
        """Raise ImageError(unsupported) if an image cannot keep bitmaps."""
        keeper(target.layers[0])

    def require_room(self, target: Image) -> None:
        """Raise ImageError if an image that was there before cannot take them, before it is changed in any way.

        unsupported or exists as :meth:`tapfs.driver.BitmapKeeper.add_bitmap`; out_of_bounds for a disk of another size.
        """
        self.require_kept(target)
        size = self.source.geometry.virtual_size
        if target.size != size:
            message = f"has a disk of {target.size} bytes, and the bitmaps are of one of {size}"
            raise ImageError(ErrorKind.OUT_OF_BOUNDS, message, path=target.path, op=_OP)
        with contextlib.closing(once_more(target.layers[0], writable=True, direct=False)) as layer:
            for bitmap in self.bitmaps:
                next(marked_bitmap(bitmap, (), keeper(layer)))  # the first plan is made, and never executed

    def into_file(self, path: str, options: OpenOptions) -> None:
        """Add them to an image that nobody uses. Raises ImageError."""
        for bitmap in self.bitmaps:
            add_marked_bitmap(path, bitmap, list(self.source.bitmap_ranges(bitmap.name)), options)

    def into(self, target: Image) -> None:
        """Add them to a new image whose disk is complete and flushed: nobody may write it after that.

        Raises ImageError.
        """
        for bitmap in self.bitmaps:
            _edit(target, partial(marked_bitmap, bitmap, list(self.source.bitmap_ranges(bitmap.name))))


def bitmaps_to_copy(source: Image, *, skip_broken: bool) -> CopiedBitmaps:
    """The bitmaps of an open image, of its current disk.

    Raises ImageError: unsupported for a format without bitmaps, corrupt for an inconsistent one unless `skip_broken`.
    """
    driver = source.layers[0].driver
    if not isinstance(driver, Bitmapped):
        message = f"{source.format_name} images keep no bitmaps"
        raise ImageError(ErrorKind.UNSUPPORTED, message, path=source.path, op=_OP)
    found = driver.bitmaps()
    broken = [each.name for each in found if not each.consistent]
    if broken and not skip_broken:
        message = f"bitmap {broken[0]!r} is inconsistent: what it says cannot be copied"
        remedy = "say {skip_broken_bitmaps} to leave it out"
        raise ImageError(ErrorKind.CORRUPT, message, path=source.path, op=_OP, remedy=remedy)
    return CopiedBitmaps(driver, [each for each in found if each.consistent], broken)


def bitmaps_if_any(source: Image, *, skip_broken: bool) -> CopiedBitmaps | None:
    """As `bitmaps_to_copy`, but None for a format without bitmaps."""
    keeps = isinstance(source.layers[0].driver, Bitmapped)
    return bitmaps_to_copy(source, skip_broken=skip_broken) if keeps else None


def _edit(target: Image, edit: Callable[[BitmapKeeper], Iterator[Plan]]) -> None:
    """Execute an edit on the open files of an image that waits for nothing."""
    from tapfs.kernel.engine import HostDescriptor, execute_on_files  # the target's engine is loaded already

    with contextlib.closing(once_more(target.layers[0], writable=True, direct=False)) as layer:
        for plan in edit(keeper(layer)):
            files = [HostDescriptor(file.descriptor, file.path, writable=file.writable) for file in layer.files]
            execute_on_files(files, plan)
