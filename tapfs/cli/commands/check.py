"""`tapfs check`: is the metadata of an image consistent?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.cli.json_output import print_json
from tapfs.cli.options import add_image_options, add_no_backing_option, open_options
from tapfs.cli.reporting import add_json_option, add_progress_options, count_of, print_line, progress_of
from tapfs.cli.sizes import human_size
from tapfs.errors import CODES, EXIT_NOT_CHECKED, ErrorKind

if TYPE_CHECKING:
    import argparse

    from tapfs.cli.parser import Subparsers
    from tapfs.driver import CheckReport

#: Leaked space and nothing worse, as in qemu-img.
EXIT_LEAKS = 3


def add_parser(subparsers: Subparsers) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "check",
        help="check the metadata of an image",
        description="Read all metadata of IMAGE and say what is wrong with it. Without -r nothing is changed.\n"
        "Of a package (.ova and the like) all disks are checked, and the digests that it has of its files.\n"
        "The backing file is not part of it: check it by itself. Exit code: 0 clean, 2 corrupt, 3 leaked space only,\n"
        "63 nothing was checked (raw images have no metadata); others: 'tapfs --help'.",
    )
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument(
        "-r",
        "--repair",
        metavar="WHAT",
        choices=["leaks", "all"],
        help="all: repair it as 'tapfs repair' does; leaks: only if it has leaked space and no errors",
    )
    add_no_backing_option(parser)
    add_json_option(parser)
    add_progress_options(parser)
    add_image_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check and report."""
    report = checked(arguments, repair=arguments.repair)
    return show(arguments, report)


def checked(arguments: argparse.Namespace, *, repair: str | None) -> CheckReport:
    """The report of a check, of one after a repair if `repair` is "all", or "leaks" and there are no errors."""
    from tapfs.jobs.check import check_image, repair_image
    from tapfs.jobs.check_package import check_package

    options = open_options(arguments)
    with progress_of(arguments, "repair" if repair else "check") as progress:
        if repair == "all":
            return repair_image(arguments.image, options, progress=progress)
        report = None if repair else check_package(arguments.image, options, progress=progress)
        if report is None:
            report = check_image(arguments.image, options, progress=progress)
        if repair == "leaks" and report.leaks and not report.corruptions:
            return repair_image(arguments.image, options, progress=progress)
    return report


def show(arguments: argparse.Namespace, report: CheckReport) -> int:
    """Print a report as the options ask; the exit code."""
    if arguments.json:
        print_json(report_as_json(arguments.image, report))
    elif not arguments.quiet:
        print_report(arguments.image, report)
    return exit_code(report)


def exit_code(report: CheckReport) -> int:
    """0 clean, 2 corrupt, 3 leaks only, 63 nothing was checked."""
    if not report.checked:
        return EXIT_NOT_CHECKED
    if report.corruptions:
        return CODES[ErrorKind.CORRUPT].exit_code
    return EXIT_LEAKS if report.leaks else 0


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
