"""`tapfs map`: where each run of the virtual disk comes from."""

from __future__ import annotations

import itertools
import json
import sys
from typing import TYPE_CHECKING

from tapfs.cli.json_output import begin_document
from tapfs.cli.options import (
    IMAGE_HELP,
    add_image_options,
    add_no_backing_option,
    chain_was_opened,
    open_image,
    open_options,
)
from tapfs.cli.parser import UsageError, size_argument
from tapfs.cli.reporting import add_json_option, print_line
from tapfs.cli.sizes import human_size
from tapfs.errors import ErrorKind, ImageError, printable

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

    from tapfs.cli.parser import Subparsers
    from tapfs.disk.chain_map import MappedExtent
    from tapfs.disk.image import Image
    from tapfs.kernel.map_lines import Words

#: The beginning of each line of a map in JSON.
_COMMA = ",\n"

_BITMAP_COLUMNS = "{:<15} {:<15} {}"
_COLUMNS = "{:<15} {:<15} {:<15} {}"


def add_parser(subparsers: Subparsers) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "map",
        help="show where each run of the virtual disk comes from",
        description="Show where each run of the virtual disk comes from: the file of the chain and the offset in it.\n"
        "On a terminal a bar of the disk stands above the table (NO_COLOR: without colours).\n"
        "Zeros are left out, and with --no-backing what only a parent knows. --json prints the whole map as\n"
        "'qemu-img map --output=json' of QEMU 10 does.",
    )
    parser.add_argument("image", metavar="IMAGE", help=IMAGE_HELP)
    parser.add_argument(
        "-s", "--start-offset", metavar="OFFSET", type=size_argument, default=0, help="start here (default: 0)"
    )
    parser.add_argument("-l", "--max-length", metavar="LENGTH", type=size_argument, help="stop after so many bytes")
    parser.add_argument(
        "--bitmap",
        metavar="NAME",
        help="instead of the map the ranges that this bitmap of IMAGE marks, with --json all others, too",
    )
    parser.add_argument(
        "--html",
        metavar="FILE",
        help="draw the map in a page instead, as 'tapfs report' does; - is standard output",
    )
    add_no_backing_option(parser)
    add_json_option(parser)
    add_image_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print it, block by block; needs no password."""
    if arguments.html is not None:
        return _draw(arguments)
    if arguments.bitmap is not None:
        return _print_bitmap(arguments)
    with _opened(arguments) as image:
        start = min(arguments.start_offset, image.size)
        length = image.size - start
        if arguments.max_length is not None:
            length = min(length, arguments.max_length)
        if arguments.json:
            _print_json(image, start, length)
        else:
            _print_table(image, start, length)
    return 0


def _draw(arguments: argparse.Namespace) -> int:
    from tapfs.cli.commands.report import write_report

    if arguments.bitmap is not None or arguments.json or arguments.start_offset or arguments.max_length is not None:
        message = "--html draws the whole disk: it does not go with --bitmap, --json, --start-offset and --max-length"
        raise UsageError(message, "tapfs map")
    arguments.sector_size = None
    arguments.quiet, arguments.progress, arguments.p = False, "auto", False
    write_report(arguments, [arguments.image], check=True)
    return 0


def _print_bitmap(arguments: argparse.Namespace) -> int:
    from tapfs.jobs.bitmaps import read_bitmap

    if arguments.snapshot is not None:
        raise UsageError("a bitmap is of the current disk: --bitmap does not go with --snapshot", "tapfs map")
    with read_bitmap(arguments.image, arguments.bitmap, open_options(arguments)) as (bitmap, size, ranges):
        start = min(arguments.start_offset, size)
        end = size if arguments.max_length is None else min(size, start + arguments.max_length)
        marked = (
            (max(offset, start), min(offset + length, end))
            for offset, length in ranges
            if offset < end and offset + length > start
        )
        if arguments.json:
            _print_bitmap_json({"path": arguments.image, **bitmap._asdict()}, marked, start, end)
            return 0
        print_line(_BITMAP_COLUMNS.format("Offset", "Length", "Size"))
        for low, high in marked:
            print_line(_BITMAP_COLUMNS.format(f"{low:#x}", f"{high - low:#x}", human_size(high - low)))
    return 0


def _print_bitmap_json(about: dict[str, object], marked: Iterable[tuple[int, int]], start: int, end: int) -> None:
    """One object a line for each run that is marked and for each that is not."""
    from tapfs.disk.json_text import json_text

    begin_document()
    sys.stdout.write(json_text(about).removesuffix("\n}") + ',\n  "extents": [')
    separator = "\n"
    for low, high in itertools.chain(marked, ((end, end),)):
        for first, stop, dirty in ((start, low, False), (low, high, True)):
            if stop > first:
                run = json.dumps({"start": first, "length": stop - first, "dirty": dirty})
                sys.stdout.write(f"{separator}{run}")
                separator = _COMMA
        start = high
    sys.stdout.write("]}\n")


def _opened(arguments: argparse.Namespace) -> Image:
    if arguments.no_backing:
        from tapfs.disk.inspection import inspect

        image = inspect(arguments.image, open_options(arguments)).image
        chain_was_opened(image)
        return image
    try:
        return open_image(arguments, metadata_only=True)
    except ImageError as error:
        from tapfs.disk.chain import OPENING_PARENT

        if error.kind is ErrorKind.NOT_FOUND and error.op == OPENING_PARENT:
            known = "" if error.neutral_remedy is None else f"{error.neutral_remedy}, or "
            error.remedy = f"{known}map this image alone with --no-backing"
        raise


def _print_json(image: Image, offset: int, length: int) -> None:
    """One object a line, as qemu-img does, thousands of lines at a time: a huge map needs no memory."""
    from tapfs.kernel.map_lines import Words

    begin_document()
    begun = False
    for text in image.disk_map.lines(offset, offset + length, lambda extent: Words(_keys(extent)), json=True):
        sys.stdout.write(text if begun else f"[{text.removeprefix(_COMMA)}")
        begun = True
    sys.stdout.write("]\n" if begun else "[]\n")


def _keys(extent: MappedExtent) -> str:
    """What extents have in common: the keys between `length` and `offset`, as JSON."""
    common = {
        "depth": extent.depth,
        "present": extent.present,
        "zero": extent.zero,
        "data": extent.data,
        "compressed": extent.compressed,
    }
    return json.dumps(common)[1:-1]


def _print_table(image: Image, offset: int, length: int) -> None:
    if sys.stdout.isatty():
        from tapfs.cli.disk_bar import print_bar

        print_bar(image, offset, length)
    print_line(_COLUMNS.format("Offset", "Length", "Mapped to", "File"))
    for text in image.disk_map.lines(offset, offset + length, _words, json=False):
        sys.stdout.write(text)


def _words(extent: MappedExtent) -> Words | None:
    from tapfs.kernel.map_lines import Words

    if not extent.data:
        return None
    return Words(printable(extent.host_path or ""), "compressed" if extent.compressed else "encrypted")
