"""Gather what a report says of one image: its facts, its picture, and what a check has found."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from tapfs.disk.inspection import inspect
from tapfs.errors import ImageError
from tapfs.jobs.check import check_image
from tapfs.report.picture import Picture, picture_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from tapfs.disk.chain import OpenOptions
    from tapfs.disk.description import ImageInfo
    from tapfs.driver import CheckReport
    from tapfs.findings import Finding

#: Labels and values for people.
Facts = list[tuple[str, str]]


class Gathered(NamedTuple):
    """One image in a report. What could not be had is None, and `error` says why.

    `located`: the findings that have a place in the image file, in its order; the picture has their places on the disk.
    """

    path: str
    infos: list[ImageInfo]
    facts: Facts
    picture: Picture | None
    check: CheckReport | None
    located: list[Finding]
    error: ImageError | None


def gather(
    path: str,
    options: OpenOptions,
    facts_of: Callable[[ImageInfo], Facts],
    *,
    password: bytes | None = None,
    check: bool = True,
    most_runs: int,
    sector_size: int | None = None,
) -> Gathered:
    """Look at an image. An image that cannot be opened is no exception, but an entry with its error."""
    infos: list[ImageInfo] = []
    facts: Facts = []
    picture: Picture | None = None
    report: CheckReport | None = None
    located: list[Finding] = []
    failure: ImageError | None = None
    try:
        if check:
            report = check_image(path, options)
            found = [finding for finding in report.findings if finding.host_offset is not None]
            located = sorted(found, key=lambda finding: finding.host_offset or 0)
        with inspect(path, options, password=password) as inspected:
            infos = inspected.infos(sector_size=sector_size)
            facts = facts_of(infos[0])
            places = [finding.host_offset or 0 for finding in located]
            picture = picture_of(inspected.image, places, most_runs=most_runs)
            inspected.raise_refusal()
    except ImageError as error:
        failure = error
    return Gathered(path, infos, facts, picture, report, located, failure)
