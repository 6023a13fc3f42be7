"""`tapfs check`: is the metadata of an image consistent?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.cli.options import add_image_options, open_options
from tapfs.cli.reporting import add_json_option, add_progress_options, print_json, printable, progress_of
from tapfs.cli.sizes import human_size
from tapfs.errors import CODES, ErrorKind

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
        description="Read all metadata of IMAGE and say what is wrong with it. Changes nothing.\n"
        "Exit code: 0 clean, 2 corrupt, 3 leaked space only; others: 'tapfs --help'.",
    )
    parser.add_argument("image", metavar="IMAGE")
    add_json_option(parser)
    add_progress_options(parser)
    add_image_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check and report."""
    from tapfs.jobs.check import check_image

    with progress_of(arguments, "check") as progress:
        report = check_image(arguments.image, open_options(arguments), progress=progress)
    if arguments.json:
        print_json(report_as_json(arguments.image, report))
    elif not arguments.quiet:
        print_report(arguments.image, report)
    return exit_code(report)


def exit_code(report: CheckReport) -> int:
    """0 clean, 2 corrupt, 3 leaks only."""
    if report.corruptions:
        return CODES[ErrorKind.CORRUPT].exit_code
    return EXIT_LEAKS if report.leaks else 0


def report_as_json(path: str, report: CheckReport) -> dict[str, object]:
    """The report for programs."""
    return {
        "path": path,
        "corruptions": report.corruptions,
        "leaks": report.leaks,
        "leaked_bytes": report.leaked_bytes,
        "allocated_bytes": report.allocated_bytes,
        "findings": [
            {"severity": str(found.severity), "message": found.message, "host_offset": found.host_offset}
            for found in report.findings
        ],
    }


def print_report(path: str, report: CheckReport) -> None:
    """The report for people: the findings, then one line that sums up."""
    for found in report.findings:
        place = "" if found.host_offset is None else f" (at byte {found.host_offset:#x})"
        print(f"{found.severity}: {printable(found.message)}{place}")
    hidden = report.corruptions + report.leaks - sum(found.severity != "note" for found in report.findings)
    if hidden > 0:
        print(f"... and {hidden} more")
    if report.corruptions:
        verdict = f"corrupt: {report.corruptions} errors"
        if report.leaks:
            verdict += f", {report.leaks} leaks"
    elif report.leaks:
        verdict = f"{report.leaks} leaks ({human_size(report.leaked_bytes)}), no errors"
    else:
        verdict = "no errors"
    print(f"{printable(path)}: {verdict}; {human_size(report.allocated_bytes)} of guest data allocated")
