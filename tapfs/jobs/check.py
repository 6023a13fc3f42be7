"""Checking and repairing one image: its own metadata, not its parents'."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

from tapfs.disk.chain import OpenOptions, open_layer
from tapfs.driver import Checkable, CheckReport, ProgressCallback, Severity
from tapfs.errors import ErrorKind, ImageError
from tapfs.host.files import LocalFiles
from tapfs.host.location import locate
from tapfs.plan import Plan


def check_image(path: str, options: OpenOptions, *, progress: ProgressCallback | None = None) -> CheckReport:
    """Check an image; a format without metadata has nothing to find.

    An image too damaged to open is reported as corrupt, too; raises ImageError for one that
    cannot be read at all or is of no format that can be damaged.
    """
    with _opened(path, options, writable=False) as (_, driver):
        if isinstance(driver, ImageError):
            return _unopenable(driver)
        return CheckReport() if driver is None else driver.check(progress)


def plan_repair(path: str, options: OpenOptions) -> list[Plan]:
    """What `repair_image` would do."""
    with _opened(path, options, writable=False) as (_, driver):
        if isinstance(driver, ImageError):
            raise driver
        return [] if driver is None else list(driver.repair())


def repair_image(path: str, options: OpenOptions, *, progress: ProgressCallback | None = None) -> CheckReport:
    """Repair what can be repaired without losing guest data. The report is of a check after it.

    Its `mended` says what was repaired.

    Each step is crash-safe: whenever it is interrupted, the image reads as before or better.
    """
    from tapfs.kernel.engine import HostDescriptor, execute_on_files  # only a repair needs the engine

    with _opened(path, options, writable=True) as (files, driver):
        if isinstance(driver, ImageError):
            raise driver
        if driver is None:
            return CheckReport()
        mended: list[str] = []
        for plan in driver.repair():
            execute_on_files([HostDescriptor(file.descriptor, file.path, writable=True) for file in files], plan)
            mended += [plan.mends] if plan.mends else []
    report = check_image(path, options, progress=progress)
    report.mended = mended
    return report


@contextlib.contextmanager
def _opened(
    path: str, options: OpenOptions, *, writable: bool
) -> Generator[tuple[LocalFiles, Checkable | ImageError | None]]:
    """The files with their driver if that can be checked, or the damage that kept it from opening."""
    lenient = OpenOptions(
        format=options.format, lenient=True, sharing=options.sharing, gate=options.gate, writable=writable
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
        yield layer.files, layer.driver if isinstance(layer.driver, Checkable) else None


def _unopenable(error: ImageError) -> CheckReport:
    report = CheckReport()
    report.add(Severity.CORRUPTION, error.message, error.offset)
    return report
