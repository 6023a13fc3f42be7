"""Rebase an image: have it name another parent, and keep its disk as it is.

Where the new parent has other bytes than the old one, and the image holds none of its own, the old bytes are written
into the image first. They are durable before the image names the new parent. Until then it reads through the old one,
which shows the same bytes. So whatever ends a rebase, the disk is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing

from tapfs.disk.bases import note_parent
from tapfs.disk.chain import Layer, OpenOptions, files_below, is_encrypted, open_layer, open_layers
from tapfs.disk.image import Image
from tapfs.disk.live import once_more
from tapfs.disk.password import password_missing
from tapfs.disk.probe import format_named
from tapfs.driver import BackingReference, Driver, Rebasable, Snapshotted, Trait, has_trait
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Range, without
from tapfs.host.location import Location, locate_parent, stored_parent
from tapfs.jobs.compare import unequal_candidates
from tapfs.jobs.editing import edit_image, execute_edit
from tapfs.jobs.pace import Pace
from tapfs.jobs.pipeline import WINDOW_BYTES
from tapfs.jobs.progress import silent
from tapfs.jobs.range_copy import Run, write_differences
from tapfs.plan import Plan
from tapfs.records import NamedTuple, replace

_SAY_RAW = "say {parent_format=raw}"


class Rebased(NamedTuple):
    """The outcome of a rebase: the parent's name as it was stored, and the bytes of data that were written."""

    backing: str | None
    data_bytes: int


def rebase_image(
    path: str,
    options: OpenOptions,
    backing: str | None,
    *,
    backing_formats: Sequence[str] = (),
    unsafe: bool = False,
    compressed: bool = False,
    password: bytes | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Rebased:
    """Have the image `path` name `backing` as its parent, or none.

    A relative name starts at the folder of the image. `backing_formats` are those of the new parent and of its own
    parents, nearest first. With `unsafe` the name alone changes: the caller knows that the disk stays the same, and no
    parent need be there. `compressed` packs what is written into the image. Raises ImageError.
    """
    options = replace(options, write_base=True)  # what lies over the image sees the same disk
    stored = stored_parent(backing) if backing else None
    if unsafe:
        _rename(path, options, stored, backing_formats)
        return Rebased(stored, 0)
    with ExitStack() as stack:
        layers = _entered(stack, open_layers(path, replace(options, writable=True)))
        below: list[Layer] = []
        if stored is not None:
            location = locate_parent(path, stored)
            wanted = _as_parent(options, backing_formats or _formats_in(layers, location))
            _refuse_loop(layers[0], location, wanted)
            below = _entered(stack, open_layers(location.name, wanted))
        _check(layers, below, password)
        reference = _reference(stored, backing_formats, below[0] if below else None)
        parent = below[0].driver if below else None
        _try_out(layers[0], reference, parent)
        cache_bytes = options.cache_bytes
        new = None
        if below:
            new = stack.enter_context(Image(below, writable=False, password=password, cache_bytes=cache_bytes))
        old = Image(layers, writable=True, password=password, cache_bytes=cache_bytes)
        with old:
            written = _write(old, new, _common_depth(layers, below), progress or silent, compressed=compressed)
            old.end_writing()
            top = once_more(layers[0], writable=True, direct=False)
            stack.callback(top.close)
            execute_edit(top, _plans(top, reference, parent))
            old.abandon()  # its driver knows the image as it was
        if below:
            note_parent(below[0].file, path)
    return Rebased(stored, written)


def _rename(path: str, options: OpenOptions, stored: str | None, backing_formats: Sequence[str]) -> None:
    """Change the name alone."""
    parent: Layer | None = None
    with ExitStack() as stack:
        if stored is not None:
            location = locate_parent(path, stored)
            wanted = _as_parent(options, backing_formats)
            with closing(open_layer(path, OpenOptions(lenient=True))) as image:
                _refuse_loop(image, location, wanted)
            try:
                parent = open_layer(location.name, wanted)
                stack.callback(parent.close)
            except ImageError:
                parent = None  # it need not be readable
        reference = _reference(stored, backing_formats, parent)
        driver = None if parent is None else parent.driver
        edit_image(path, options, lambda layer: _plans(layer, reference, driver))
        if parent is not None:
            note_parent(parent.file, path)


def _as_parent(options: OpenOptions, formats: Sequence[str]) -> OpenOptions:
    """How the new parent is opened."""
    return OpenOptions(
        format=formats[0] if formats else None,
        backing_formats=formats[1:],
        gate=options.gate,
        direct=options.direct,
        any_parent=options.any_parent,
        parent_folders=options.parent_folders,
        say_raw=_SAY_RAW,
    )


def _formats_in(layers: Sequence[Layer], location: Location) -> list[str]:
    """The formats of the new parent and of those below it, where it is one of the parents already."""
    wanted = location.identity()
    depth = next((depth for depth, layer in enumerate(layers) if depth and layer.file.identity == wanted), len(layers))
    return [layer.driver.format_name for layer in layers[depth:]]


def _reference(stored: str | None, formats: Sequence[str], parent: Layer | None) -> BackingReference | None:
    if stored is None:
        return None
    return BackingReference(stored, formats[0] if formats else None if parent is None else _found_format(parent))


def _entered(stack: ExitStack, layers: list[Layer]) -> list[Layer]:
    for layer in layers:
        stack.callback(layer.close)
    return layers


def _found_format(parent: Layer) -> str | None:
    """The format that the parent shows, where its contents prove it."""
    name = parent.driver.format_name
    return None if has_trait(format_named(name), Trait.GUESSED) else name


def _plans(layer: Layer, reference: BackingReference | None, parent: Driver | None) -> Iterator[Plan]:
    driver = layer.driver
    if not isinstance(driver, Rebasable):
        message = f"a {driver.format_name} image cannot get another backing file"
        raise ImageError(ErrorKind.UNSUPPORTED, message, path=layer.path, op="rebase")
    try:
        yield from driver.rebase(reference, parent)
    except ImageError as error:
        error.path = error.path or layer.path
        raise


def _try_out(top: Layer, reference: BackingReference | None, parent: Driver | None) -> None:
    """Raise what the edit would raise, before anything is copied for it."""
    trial = once_more(top, writable=True, direct=False)
    try:
        next(_plans(trial, reference, parent), None)
    finally:
        trial.close()


def _check(layers: Sequence[Layer], below: Sequence[Layer], password: bytes | None) -> None:
    top = layers[0]
    if password is None and is_encrypted((*layers, *below)):
        raise password_missing(top.path)
    if isinstance(top.driver, Snapshotted) and top.driver.snapshots():
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            "has snapshots, which show the backing file, too: they would not stay what they are",
            path=top.path,
            op="rebase",
            remedy="delete them first, or change the name alone with {unsafe}",
        )


def _refuse_loop(image: Layer, parent: Location, options: OpenOptions) -> None:
    if set(image.files.identities) & files_below(parent.name, options):
        message = f"{parent.name} is the image itself, or lies above it"
        raise ImageError(ErrorKind.INVALID_ARGUMENT, message, path=image.path, op="rebase")


def _common_depth(layers: Sequence[Layer], below: Sequence[Layer]) -> int | None:
    """Where in the old chain the new parent is, with the parents that it has there; None where it is not."""
    chain = [layer.file.identity for layer in layers]
    wanted = [layer.file.identity for layer in below]
    return next((depth for depth in range(1, len(chain)) if wanted and chain[depth:] == wanted), None)


def _write(
    old: Image, new: Image | None, common: int | None, progress: Callable[[int, int], None], *, compressed: bool
) -> int:
    """Write what the image is to hold from now on; how many bytes of data that were.

    A unit of which the image holds a part cannot be packed. Such units come last, when the stream of packed ones has
    ended, and get what they lack as it is.
    """
    geometry = old.layers[0].driver.geometry
    if not compressed:
        return write_differences(old, new, old, _runs(old, new, common, geometry.granule), Pace(None), progress)
    from tapfs.jobs.packed_differences import append_differences  # few rebases pack

    unit = geometry.packed_unit
    runs = _runs(old, new, common, unit)
    if unit == geometry.granule:
        return append_differences(old, new, old, runs, Pace(None), progress)
    parts = without(((run.offset, run.length) for run in runs), _partly_held(old, unit))
    count = append_differences(old, new, old, (Run(*each) for each in parts), Pace(None), progress)
    left = _inside(_runs(old, new, common, geometry.granule), _partly_held(old, unit))
    return count + write_differences(old, new, old, left, Pace(None), progress)


def _inside(runs: Iterator[Run], units: Iterator[Range]) -> Iterator[Run]:
    """What of ascending runs lies in ascending units."""
    unit = next(units, None)
    for run in runs:
        at, end = run.offset, run.offset + run.length
        while unit is not None and at < end:
            start, stop = max(at, unit.offset), min(end, unit.end)
            if start < stop:
                yield Run(start, stop - start)
            at = max(at, stop)
            if unit.end > end:
                break
            unit = next(units, None)


def _partly_held(image: Image, unit: int) -> Iterator[Range]:
    """The units in which what the image holds by itself begins or ends, or a piece of it does; ascending."""
    reached = 0
    for extent in image.extents():
        if extent.depth or not extent.present:
            continue
        for edge in (extent.offset, extent.end):
            start = edge // unit * unit
            if edge % unit and start >= reached:
                reached = start + unit
                yield Range(start, unit)


def _runs(old: Image, new: Image | None, common: int | None, unit: int) -> Iterator[Run]:
    """What the image itself does not hold and what the new parent may have otherwise, in whole units."""
    end = 0
    for start, stop in _parents_runs(old, common):
        aligned, limit = max(start // unit * unit, end), min(-(-stop // unit) * unit, old.size)
        for offset, length in _candidates(old, new, aligned, limit):
            first, last = max(offset // unit * unit, end), min(-(-(offset + length) // unit) * unit, old.size)
            if first < last:
                yield Run(first, last - first)
                end = last


def _parents_runs(old: Image, common: int | None) -> Iterator[tuple[int, int]]:
    """The ranges that are decided below the image, and above what is below it afterwards as well; neighbours joined."""
    start = stop = 0
    for extent in old.extents():
        own = extent.depth == 0 and extent.present
        if own or (common is not None and extent.depth >= common):
            continue
        if extent.offset > stop:
            if start < stop:
                yield start, stop
            start = extent.offset
        stop = extent.end
    if start < stop:
        yield start, stop


def _candidates(old: Image, new: Image | None, offset: int, end: int) -> Iterator[Range]:
    """The ranges that are not known to be zeros in both."""
    if new is not None:
        for both in unequal_candidates(old, new, offset, end):
            yield from both
        return
    while offset < end:
        found = old.disk_map.data_ranges(offset, end, most_bytes=WINDOW_BYTES)
        yield from found
        offset = found.until
