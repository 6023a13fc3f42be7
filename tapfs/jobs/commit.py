"""Commit an overlay: write what it holds into its base, then empty it.

The order keeps the overlay's disk the same at every moment. The base is written only where the overlay, or an image
between the two, hides it. All of that is durable before the overlay forgets a byte. So whatever ends a commit, the
overlay reads as before, and the commit can be begun anew. A data file (qcow2) gets its holes at the very end, once the
overlay has durably forgotten what was there.

Some images name their parent by an identity that a write changes (VMDK, VHDX, VDI). The child of the base gets the new
identity before anything else is written (`tapfs.jobs.kept_link`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

from tapfs.disk.chain import Layer, OpenOptions, is_encrypted
from tapfs.disk.chain_map import map_chain
from tapfs.disk.commit_layers import CommitLayers, open_for_commit
from tapfs.disk.image import Image
from tapfs.disk.live import once_more
from tapfs.disk.password import password_missing
from tapfs.driver import PlaceKeeping, Rebasable, Resizable, Snapshotted, Uncovering
from tapfs.errors import ErrorKind, ImageError
from tapfs.jobs.editing import execute_edit
from tapfs.jobs.kept_link import begin_writing, bind, unbound
from tapfs.jobs.pace import Pace
from tapfs.jobs.progress import silent
from tapfs.jobs.range_copy import Run, overwrite
from tapfs.jobs.resize import resize_image
from tapfs.records import NamedTuple, replace

#: An overlay is emptied in pieces of so many bytes of its disk, so that it can be ended.
EMPTYING_BYTES = 16 << 30


class Committed(NamedTuple):
    """The outcome of a commit.

    `data_bytes` were written to the image `base`; zeros are not counted. `emptied`: the overlay holds nothing any more.
    `invalid` are the images between overlay and base: what they read as by themselves is of no use any more.
    """

    base: str
    data_bytes: int
    emptied: bool
    invalid: tuple[str, ...]


def commit_image(
    path: str,
    options: OpenOptions,
    *,
    base: str | None = None,
    keep: bool = False,
    rate: int | None = None,
    password: bytes | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Committed:
    """Write what the overlay `path` holds into its parent, or into `base` further down its chain.

    The overlay is emptied, unless it is to `keep` what it holds, or the base is further down. A base that is smaller
    than the overlay grows. `rate` bounds the bytes a second. Everything is durable when this returns.
    Raises ImageError.
    """
    empties = not keep and base is None
    with closing(open_for_commit(path, options, base, empties=empties)) as layers:
        _check(layers, empties=empties, password=password)
        too_small = layers.below if _is_too_small(layers) else None
        binds = too_small is not None and unbound(layers.child, layers.below[0])
    if too_small is not None:
        try:
            _grow(too_small, layers.above[0].driver.geometry.virtual_size, options, password)
        finally:
            if binds:
                with closing(open_for_commit(path, options, base, empties=empties, links=True)) as layers:
                    bind(layers.child, layers.below[0])
    with closing(open_for_commit(path, options, base, empties=empties)) as layers:
        _check(layers, empties=empties, password=password)
        written = _Commit(layers, options, password, Pace(rate), progress or silent).run(empties=empties)
        return Committed(layers.below[0].path, written, empties, tuple(layer.path for layer in layers.above[1:]))


class _Commit:
    """One commit on open layers, which stay the caller's to close."""

    def __init__(
        self,
        layers: CommitLayers,
        options: OpenOptions,
        password: bytes | None,
        pace: Pace,
        progress: Callable[[int, int], None],
    ) -> None:
        self._layers = layers
        self._password = password
        self._cache_bytes = options.cache_bytes
        self._pace = pace
        self._progress = progress

    def run(self, *, empties: bool) -> int:
        """Write the base, then empty the overlay; how many bytes of data were written."""
        if not _hold_anything(self._layers.above):
            if empties:
                free_places(self._layers.above[0])  # a commit may have been ended before that
            return 0
        with self._image(self._layers.below, writable=True) as lower:
            above = [*self._layers.above[:-1], self._linked_child(lower, writable=empties)]
            with self._image(above, writable=empties) as upper:
                written = overwrite(upper, lower, _runs(upper), self._pace, self._progress)
                lower.end_writing()
                if empties:
                    for offset in range(0, upper.size, EMPTYING_BYTES):
                        upper.uncover(offset, min(EMPTYING_BYTES, upper.size - offset))
                    upper.end_writing()
                    free_places(above[0])
        return written

    def _image(self, layers: list[Layer], *, writable: bool) -> Image:
        return Image(layers, writable=writable, password=self._password, cache_bytes=self._cache_bytes)

    def _linked_child(self, base: Image, *, writable: bool) -> Layer:
        """The child of the base, once it names the identity that the base has now."""
        child = self._layers.child
        if not begin_writing(base, child):
            return child
        return once_more(child, writable=writable, direct=child.file.direct)


def free_places(overlay: Layer) -> None:
    """Give back the places of what an overlay has durably forgotten, where its flushes could not; nobody writes it."""
    if isinstance(overlay.driver, PlaceKeeping):
        with closing(once_more(overlay, writable=True, direct=False)) as layer:
            if isinstance(layer.driver, PlaceKeeping):
                execute_edit(layer, iter([layer.driver.unused_places()]))


def _check(layers: CommitLayers, *, empties: bool, password: bytes | None) -> None:
    """Raise ImageError for what would end the commit half-way."""
    top, child = layers.above[0], layers.child
    if password is None and is_encrypted((*layers.above, *layers.below)):
        raise password_missing(top.path)
    if empties and not (isinstance(top.driver, Uncovering) and top.driver.can_uncover):
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            f"tapfs cannot empty this {top.driver.format_name} overlay once it is committed",
            path=top.path,
            op="commit",
            remedy="say {keep}: it then goes on to hold what the base has as well",
        )
    for layer in layers.above:
        if isinstance(layer.driver, Snapshotted) and layer.driver.snapshots():
            raise ImageError(
                ErrorKind.UNSUPPORTED,
                "has snapshots, which show the base, too: they would not stay what they are",
                path=layer.path,
                op="commit",
                remedy="delete them first",
            )
    reference = child.driver.geometry.backing
    if reference is not None and reference.identity is not None and not isinstance(child.driver, Rebasable):
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            "names its parent by an identity that changes when that is written, and tapfs cannot write the new one",
            path=child.path,
            op="commit",
        )


def _is_too_small(layers: CommitLayers) -> bool:
    """Whether the base must grow. Raises ImageError(out_of_bounds) where it cannot."""
    base, size = layers.below[0], layers.above[0].driver.geometry.virtual_size
    found = base.driver.geometry.virtual_size
    if found >= size:
        return False
    if not isinstance(base.driver, Resizable) or base.file.is_block_device:
        raise ImageError(
            ErrorKind.OUT_OF_BOUNDS,
            f"has {found} bytes and the overlay {size}, and tapfs cannot make it larger",
            path=base.path,
            op="commit",
            remedy="make it larger by other means first, or convert the overlay to a new image",
        )
    return True


def _grow(below: Sequence[Layer], size: int, options: OpenOptions, password: bytes | None) -> None:
    """Make the base, which was closed, as large as the overlay. What is added reads as zeros, as it did above it."""
    base = replace(
        options,
        format=below[0].driver.format_name,
        backing_formats=[layer.driver.format_name for layer in below[1:]],
        write_base=True,  # that it may be written was looked at when it was opened
    )
    resize_image(below[0].path, lambda now: max(now, size), base, password=password)


def _runs(upper: Image) -> Iterator[Run]:
    """What the images above the base decide: of the rest they say that it is the base's."""
    for extent in upper.extents():
        if extent.data or extent.zero:
            yield Run(extent.offset, extent.length, zero=extent.zero)


def _hold_anything(above: list[Layer]) -> bool:
    """Whether any byte is not the base's."""
    size = above[0].driver.geometry.virtual_size
    return any(extent.data or extent.zero for extent in map_chain(above, 0, size))
