"""`tapfs report`: a page about images for people to look at."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

from tapfs.cli.options import IMAGE_HELP, add_image_options, add_no_backing_option, add_sector_size_option, open_options
from tapfs.cli.reporting import add_progress_options, count_of, print_line, progress_of
from tapfs.cli.sizes import human_size

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from tapfs.cli.parser import Subparsers
    from tapfs.disk.description import ImageInfo


def add_parser(subparsers: Subparsers) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "report",
        help="make a page with the maps, contents and checks of images",
        description="Make one HTML page about IMAGEs: the map of each drawn, to be zoomed into; partitions and file\n"
        "systems; the chain; what a check finds, and where; compression and fragments; all that 'tapfs info' says.\n"
        "The page needs no network and no other file. An image that cannot be opened is in the page with its error,\n"
        "and the exit code is that of the first such error. The images are only read.",
    )
    parser.add_argument("image", metavar="IMAGE", help=IMAGE_HELP)
    parser.add_argument("images", metavar="IMAGE", nargs="*", help="further images; all options hold for each")
    parser.add_argument(
        "--html",
        metavar="FILE",
        required=True,
        help="the page; an older page of that name is replaced, another file is not; - is standard output",
    )
    parser.add_argument(
        "--no-check", action="store_true", help="do not check the images, which reads all their metadata"
    )
    add_sector_size_option(parser)
    add_no_backing_option(parser)
    add_progress_options(parser)
    add_image_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Make it."""
    write_report(arguments, [arguments.image, *arguments.images], check=not arguments.no_check)
    return 0


def write_report(arguments: argparse.Namespace, paths: Sequence[str], *, check: bool) -> None:
    """Write the page that `arguments.html` names. Raises ImageError: that of the first image is raised at the end."""
    from importlib.metadata import version

    from tapfs.disk.password import given_password
    from tapfs.report.gathered import Gathered, gather
    from tapfs.report.page import most_runs, page
    from tapfs.report.page_file import require_writable, write_page

    if arguments.html != "-":
        require_writable(arguments.html)
    password = given_password(arguments.key_file)
    options = open_options(arguments)
    entries: list[Gathered] = []
    sizes = [_bytes_of(path) for path in paths]
    with progress_of(arguments, "report") as progress:
        for path in paths:
            entry = gather(
                path,
                options,
                facts,
                password=password,
                check=check,
                most_runs=most_runs(len(paths)),
                sector_size=arguments.sector_size,
            )
            entries.append(entry)
            progress(sum(sizes[: len(entries)]), sum(sizes))
    made = f"tapfs {version('tapfs')}, {time.strftime('%Y-%m-%d %H:%M %z')}"
    text = page(paths[0] if len(paths) == 1 else count_of(len(paths), "image"), made, entries)
    if arguments.html == "-":
        sys.stdout.write(text)
    else:
        write_page(arguments.html, text)
        if not arguments.quiet:
            print_line(f"{arguments.html}: {count_of(len(paths), 'image')}, {human_size(len(text.encode()))}")
    for entry in entries:
        if entry.error is not None:
            raise entry.error


def _bytes_of(path: str) -> int:
    """The length of a file, for the progress; of what is no file 1."""
    try:
        return os.path.getsize(path) or 1
    except OSError:
        return 1


def facts(info: ImageInfo) -> list[tuple[str, str]]:
    """All that 'tapfs info -v' says of an image."""
    from tapfs.cli.commands.info import info_rows

    return list(info_rows(info, None))
