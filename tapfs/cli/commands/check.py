"""`tapfs check`: is the metadata of an image consistent?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.cli.batch_options import add_batch_options, refuse_batch_options
from tapfs.cli.damaged_files import add_files_options, files_as_json, print_files
from tapfs.cli.json_output import print_json
from tapfs.cli.options import IMAGE_HELP, add_image_options, add_no_backing_option, open_image, open_options
from tapfs.cli.parser import UsageError
from tapfs.cli.reporting import add_json_option, add_progress_options, count_of, print_line, progress_of
from tapfs.cli.sizes import human_size
from tapfs.errors import CODES, EXIT_NOT_CHECKED, ErrorKind

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

    from tapfs.cli.parser import Subparsers
    from tapfs.driver import CheckReport
    from tapfs.jobs.damaged_files import DamagedPart

#: Leaked space and nothing worse, as in qemu-img.
EXIT_LEAKS = 3

_PROGRAM = "tapfs check"

#: The exit codes of an image that was looked at.
_RESULTS = (0, CODES[ErrorKind.CORRUPT].exit_code, EXIT_LEAKS, EXIT_NOT_CHECKED)


def add_parser(subparsers: Subparsers) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "check",
        help="check the metadata of an image",
        description="Read all metadata of IMAGE and say what is wrong with it. Without -r nothing is changed.\n"
        "Of a package (.ova and the like) all disks are checked, and the digests that it has of its files.\n"
        "The backing file is not part of it: check it by itself. Exit code: 0 clean, 2 corrupt, 3 leaked space only,\n"
        "63 nothing was checked (raw images have no metadata); others: 'tapfs --help'. --batch: that of the worst.\n"
        "With --files say which files of ext, XFS, NTFS, FAT and exFAT lie in what is damaged: docs/verify.md.",
    )
    parser.add_argument("image", metavar="IMAGE", nargs="?", help=IMAGE_HELP)
    parser.add_argument(
        "-r",
        "--repair",
        metavar="WHAT",
        choices=["leaks", "all"],
        help="all: repair it as 'tapfs repair' does; leaks: only if it has leaked space and no errors",
    )
    add_files_options(parser)
    add_no_backing_option(parser)
    add_batch_options(parser, line="IMAGE with options of its own")
    add_json_option(parser)
    add_progress_options(parser)
    add_image_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check and report."""
    if arguments.batch is not None:
        if arguments.image is not None:
            raise UsageError("--batch has each IMAGE in its list", _PROGRAM)
        from tapfs.cli.batch import Kind, run_batch

        return run_batch(arguments, Kind("check", frozenset(_RESULTS), worst_of), add_parser)
    refuse_batch_options(arguments, _PROGRAM)
    if arguments.image is None:
        raise UsageError("IMAGE is missing", _PROGRAM)
    if arguments.ranges and not arguments.files:
        raise UsageError("--range goes with --files", "tapfs check")
    if arguments.files and arguments.no_backing:
        raise UsageError("--files reads the disk, for which the parents are needed", "tapfs check")
    report = checked(arguments, repair=arguments.repair)
    parts = _damaged_parts(arguments, report) if arguments.files else None
    return show(arguments, report, parts)


def _damaged_parts(arguments: argparse.Namespace, report: CheckReport) -> list[DamagedPart]:
    """The owners of what the check has found, of what cannot be mapped, and of the ranges that were named."""
    from tapfs.jobs.damaged_files import files_in, ranges_of_findings, unreadable_ranges

    with open_image(arguments) as image:
        unreadable = unreadable_ranges(image)
        found = ranges_of_findings(image, report, unreadable)
        return files_in(image, [*arguments.ranges, *unreadable, *found], sector_size=arguments.sector_size)


def checked(arguments: argparse.Namespace, *, repair: str | None, drop_bitmaps: bool = False) -> CheckReport:
    """The report of a check, of one after a repair if `repair` is "all", or "leaks" and there are no errors.

    `drop_bitmaps`: such a repair gives up bitmaps that cannot be true.
    """
    from tapfs.jobs.check import check_image, repair_image
    from tapfs.jobs.check_package import check_package

    options = open_options(arguments)
    with progress_of(arguments, "repair" if repair else "check") as progress:
        if repair == "all":
            return repair_image(arguments.image, options, drop_bitmaps=drop_bitmaps, progress=progress)
        report = None if repair else check_package(arguments.image, options, progress=progress)
        if report is None:
            report = check_image(arguments.image, options, progress=progress)
        if repair == "leaks" and report.leaks and not report.corruptions:
            return repair_image(arguments.image, options, progress=progress)
    return report


def show(arguments: argparse.Namespace, report: CheckReport, parts: list[DamagedPart] | None = None) -> int:
    """Print a report as the options ask, and whose the damage is if that was asked; the exit code."""
    if arguments.json:
        files = {} if parts is None else {"files": files_as_json(parts)}
        print_json({**report_as_json(arguments.image, report), **files})
    elif not arguments.quiet:
        print_report(arguments.image, report)
        print_files(parts or [])
    return exit_code(report)


def exit_code(report: CheckReport) -> int:
    """0 clean, 2 corrupt, 3 leaks only, 63 nothing was checked."""
    if not report.checked:
        return EXIT_NOT_CHECKED
    if report.corruptions:
        return CODES[ErrorKind.CORRUPT].exit_code
    return EXIT_LEAKS if report.leaks else 0


def worst_of(codes: Iterable[int]) -> int:
    """The exit code of many checks: corrupt, else the first failure, else leaks, else 0; 63 if none was checked."""
    found = list(codes)
    if CODES[ErrorKind.CORRUPT].exit_code in found:
        return CODES[ErrorKind.CORRUPT].exit_code
    failed = next((code for code in found if code not in _RESULTS), 0)
    if failed or EXIT_LEAKS in found:
        return failed or EXIT_LEAKS
    return EXIT_NOT_CHECKED if found and set(found) == {EXIT_NOT_CHECKED} else 0


def report_as_json(path: str, report: CheckReport) -> dict[str, object]:
    """The report for programs."""
    return {
        "path": path,
        "checked": report.checked,
        "unchecked": report.unchecked,
        "unchecked_parent": report.unchecked_parent,
        "corruptions": report.corruptions,
        "leaks": report.leaks,
        "leaked_bytes": report.leaked_bytes,
        "allocated_bytes": report.allocated_bytes,
        "findings": [
            {"severity": str(found.severity), "message": found.message, "host_offset": found.host_offset}
            for found in report.findings
        ],
        "mended": report.mended,
    }


def print_report(path: str, report: CheckReport) -> None:
    """The report for people: what was mended, the findings, then one line that sums up."""
    for fault in report.mended:
        print_line(f"mended: {fault}")
    for found in report.findings:
        place = "" if found.host_offset is None else f" (at byte {found.host_offset:#x})"
        print_line(f"{found.severity}: {found.message}{place}")
    if report.unchecked is not None:
        print_line(f"{path}: nothing was checked: {report.unchecked}")
        return
    hidden = report.corruptions + report.leaks - sum(found.severity != "note" for found in report.findings)
    if hidden > 0:
        print_line(f"... and {hidden} more")
    if report.corruptions:
        verdict = f"corrupt: {count_of(report.corruptions, 'error')}"
        if report.leaks:
            verdict += f", {count_of(report.leaks, 'leak')}"
    elif report.leaks:
        verdict = f"{count_of(report.leaks, 'leak')} ({human_size(report.leaked_bytes)}), no errors"
    else:
        verdict = "no errors"
    print_line(f"{path}: {verdict}; {human_size(report.allocated_bytes)} of guest data allocated")
