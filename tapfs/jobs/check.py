"""Check and repair one image: its own metadata, not that of its parents.

A format without metadata, or whose driver has no checker, is never called sound. The report says why nothing was
checked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence

from tapfs.disk.chain import Layer, OpenOptions, open_layer, parent_is_missing
from tapfs.disk.misnamed import note_of_name
from tapfs.disk.recovery import JOURNAL, JOURNAL_WAITS
from tapfs.disk.table_work import use_engine_for_tables
from tapfs.driver import Checkable, CheckReport, ProgressCallback, Severity
from tapfs.driver_protocols import BitmapDropper
from tapfs.errors import ErrorKind, ImageError
from tapfs.host.files import LocalFiles
from tapfs.host.location import locate
from tapfs.plan import Plan
from tapfs.records import NamedTuple


def check_image(path: str, options: OpenOptions, *, progress: ProgressCallback | None = None) -> CheckReport:
    """Check an image.

    An image too damaged to open is reported as corrupt, too; raises ImageError for one that
    cannot be read at all or is of no format that can be damaged.
    """
    with _opened(path, options, writable=False) as (_, layer):
        if isinstance(layer, ImageError):
            return _unopenable(layer)
        checker = _checker(layer)
        report = CheckReport(unchecked=checker) if isinstance(checker, str) else checker.check(progress)
        if layer.files.patched:
            report.add(Severity.NOTE, f"{JOURNAL_WAITS}; tapfs repair replays it")
        _note_parent(report, layer, options)
        return report


class PlannedRepair(NamedTuple):
    """What a repair would do; `unchecked` says why nothing could be checked, if so."""

    plans: list[Plan]
    unchecked: str | None


def plan_repair(path: str, options: OpenOptions, *, drop_bitmaps: bool = False) -> PlannedRepair:
    """What `repair_image` would do."""
    with _opened(path, options, writable=False) as (_, layer):
        if isinstance(layer, ImageError):
            raise layer
        checker = _checker(layer)
        if isinstance(checker, str):
            return PlannedRepair([], checker)
        replay = [Plan(layer.files.patch.stages, JOURNAL)] if layer.files.patched else []
        return PlannedRepair([*replay, *_repairs(checker, path, drop_bitmaps=drop_bitmaps)], None)


def repair_image(
    path: str, options: OpenOptions, *, drop_bitmaps: bool = False, progress: ProgressCallback | None = None
) -> CheckReport:
    """Repair what can be repaired without losing guest data. The report is of a check after it.

    Its `mended` says what was repaired. `drop_bitmaps`: bitmaps that cannot be true are given up; raises
    ImageError(unsupported) where the format has none.

    Each step is crash-safe: whenever it is interrupted, the image reads as before or better.
    """
    from tapfs.kernel.engine import HostDescriptor, execute_on_files  # only a repair writes

    # What has nothing to repair is not opened for writing.
    with _opened(path, options, writable=False) as (_, layer):
        if isinstance(layer, ImageError):
            raise layer
        checker = _checker(layer)
    if isinstance(checker, str):
        return check_image(path, options)
    with _opened(path, options, writable=True) as (files, layer):
        if isinstance(layer, ImageError):
            raise layer
        checker = _checker(layer)
        mended = [JOURNAL] if layer.files.replayed else []
        plans = () if isinstance(checker, str) else _repairs(checker, path, drop_bitmaps=drop_bitmaps)
        for plan in plans:
            execute_on_files([HostDescriptor(file.descriptor, file.path, writable=True) for file in files], plan)
            mended += [plan.mends] if plan.mends else []
    report = check_image(path, options, progress=progress)
    report.mended = mended
    return report


def _repairs(checker: Checkable, path: str, *, drop_bitmaps: bool) -> Sequence[Plan]:
    if not drop_bitmaps:
        return checker.repair()
    if isinstance(checker, BitmapDropper):
        return checker.repair_dropping_bitmaps()
    message = f"a {checker.format_name} image has no bitmaps that could be dropped"
    raise ImageError(ErrorKind.UNSUPPORTED, message, path=path, op="repair")


def _checker(layer: Layer) -> Checkable | str:
    """The driver of an image that can be checked, or why it cannot."""
    driver = layer.driver
    if isinstance(driver, Checkable):
        return driver
    if driver.geometry.identity:
        return note_of_name(layer) or f"a {driver.format_name} image has no metadata"
    return f"the driver of the format {driver.format_name} has no check"


def _note_parent(report: CheckReport, layer: Layer, options: OpenOptions) -> None:
    """Say that the parent is not part of the check, or is missing. It is not opened: a header may name any file."""
    reference = layer.driver.geometry.backing
    if reference is None:
        return
    report.unchecked_parent = reference.said
    missing = parent_is_missing(layer, options)
    said = "is missing" if missing else "was not looked at: check it by itself"
    report.add(Severity.NOTE, f"the backing file {reference.said} {said}")


@contextlib.contextmanager
def _opened(path: str, options: OpenOptions, *, writable: bool) -> Generator[tuple[LocalFiles, Layer | ImageError]]:
    """The files with the image in them, or with the damage that kept it from opening."""
    use_engine_for_tables()
    lenient = OpenOptions(
        format=options.format,
        disk=options.disk,
        lenient=True,
        sharing=options.sharing,
        gate=options.gate,
        writable=writable,
    )
    try:
        layer = open_layer(path, lenient)
    except ImageError as error:
        if error.kind is not ErrorKind.CORRUPT:
            raise
        with contextlib.closing(LocalFiles(locate(path).open(sharing=options.sharing))) as files:
            yield files, error
        return
    with contextlib.closing(layer):
        yield layer.files, layer


def _unopenable(error: ImageError) -> CheckReport:
    report = CheckReport()
    report.add(Severity.CORRUPTION, error.message, error.offset)
    return report
