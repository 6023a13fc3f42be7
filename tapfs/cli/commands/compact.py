"""`tapfs compact`: give what an image has for nothing back to its host."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from tapfs.cli.json_output import print_json
from tapfs.cli.options import IMAGE_HELP, add_image_options, add_sector_size_option, open_image
from tapfs.cli.reporting import add_json_option, add_progress_options, print_line, progress_of
from tapfs.cli.sizes import human_size

if TYPE_CHECKING:
    import argparse

    from tapfs.cli.parser import Subparsers
    from tapfs.jobs.compact import CompactReport
    from tapfs.jobs.free_space import FileSystemSpace


def add_parser(subparsers: Subparsers) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "compact",
        help="give free blocks and zeros of an image back to the host",
        description="Give back what IMAGE has in its files for nothing: blocks that are free in the file systems\n"
        "on it (ext2, ext3, ext4, XFS, NTFS, FAT), and blocks of zeros. Nothing is mounted, and nothing is copied.\n"
        "A file system that was not unmounted cleanly, or whose own records contradict each other, is left alone.\n"
        "Every byte in use reads as before; a free byte reads as before or as zero. Parents stay as they are.\n"
        "The image's file gets holes and keeps its length. docs/compact.md tells more.",
    )
    parser.add_argument("image", metavar="IMAGE", help=IMAGE_HELP)
    parser.add_argument("-n", "--dry-run", action="store_true", help="say what would be given back; change nothing")
    parser.add_argument(
        "--no-zeros",
        action="store_true",
        help="do not look for zeros: reads the records of the file systems only, and not all of the image's data",
    )
    parser.add_argument("--no-free", action="store_true", help="look for zeros only")
    parser.add_argument("--swap", action="store_true", help="give back swap space, too; nobody may be suspended to it")
    parser.add_argument(
        "--partition",
        metavar="N",
        type=int,
        action="append",
        default=[],
        help="free blocks of partition N only (0: of a file system over the whole disk); may be given again",
    )
    add_sector_size_option(parser)
    add_json_option(parser)
    add_progress_options(parser)
    add_image_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Compact and say what came of it."""
    from tapfs.jobs.compact import compact

    with open_image(arguments, writable=not arguments.dry_run) as image, progress_of(arguments, "compact") as progress:
        report = compact(
            image,
            free=not arguments.no_free,
            zeros=not arguments.no_zeros,
            swap=arguments.swap,
            partitions=arguments.partition,
            sector_size=arguments.sector_size,
            dry_run=arguments.dry_run,
            progress=progress,
        )
    if arguments.json:
        print_json({"path": arguments.image, **asdict(report), "given_back": report.given_back})
    elif not arguments.quiet:
        print_report(arguments.image, report)
    return 0


def print_report(path: str, report: CompactReport) -> None:
    """The report for people, a line for each file system."""
    given = "would be given back" if report.dry_run else "given back"
    for note in report.notes:
        print_line(f"note: {note}")
    for space in report.file_systems:
        print_line(f"{_name(space)}: {_told(space, given)}")
    if report.zero_bytes is not None:
        print_line(f"zeros: {human_size(report.zero_bytes)} {given}")
    before, after = report.host_bytes_before, report.host_bytes_after
    if report.dry_run:
        print_line(f"{path}: {human_size(report.given_back)} would be given back of {human_size(before)} on the host")
    else:
        print_line(f"{path}: {human_size(before)} on the host before, {human_size(after)} after")


def _name(space: FileSystemSpace) -> str:
    place = "the disk" if space.partition is None else f"partition {space.partition}"
    facts = [fact for fact in (space.type, space.label and f'"{space.label}"') if fact]
    return f"{place} ({', '.join(facts)})" if facts else place


def _told(space: FileSystemSpace, given: str) -> str:
    if space.left_alone is not None:
        return f"left alone: {space.left_alone}"
    return f"{human_size(space.free or 0)} of {human_size(space.size)} free, {human_size(space.given_back)} {given}"
