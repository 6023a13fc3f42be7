"""`tapfs measure`: say how long the files of a new image would be."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from tapfs.cli.options import IMAGE_HELP, add_source_options, open_image
from tapfs.cli.parser import UsageError, format_argument, size_argument
from tapfs.cli.qemu_words import add_qemu_words, is_direct
from tapfs.cli.reporting import add_json_option, add_progress_options, print_line, progress_of
from tapfs.cli.targets import (
    add_sparse_size_option,
    add_target_options,
    check_copied,
    plain_new_image_of,
    print_options,
    take_backing_options,
    wants_encryption,
    wants_help,
)
from tapfs.records import replace

if TYPE_CHECKING:
    import argparse

    from tapfs.cli.parser import Subparsers
    from tapfs.disk.image import Image
    from tapfs.jobs.measure import Measured

_PROGRAM = "tapfs measure"
#: No secret: an image that is measured is gone before anybody could unlock it.
_ANY_PASSWORD = b"measured"


def add_parser(subparsers: Subparsers) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "measure",
        help="say how long the files of a new image would be",
        description="Say to the byte how long the file of a new image would be: of SOURCE as 'tapfs convert' would\n"
        "write it, with the same options, or of an empty image of SIZE. 'Fully allocated' is the length once a\n"
        "guest has written all of the disk. Nothing is written. All data of SOURCE is read, because zeros take no\n"
        "space; with -c it is packed, too. An image of several files takes the bytes of all of them.",
    )
    parser.usage = "tapfs measure [options] SOURCE [SOURCE ...]\n       tapfs measure [options] --size SIZE"
    parser.add_argument("sources", metavar="SOURCE", nargs="*", help=IMAGE_HELP)
    parser.add_argument("-s", "--size", metavar="SIZE", type=size_argument, help="measure an empty image of SIZE")
    parser.add_argument(
        "-O", "--target-format", metavar="FMT", type=format_argument, default="raw", help="its format (default: raw)"
    )
    parser.add_argument("-c", "--compress", action="store_true", help="measure a compressed image")
    add_sparse_size_option(parser, zero="count them all")
    parser.add_argument(
        "--skip-broken-bitmaps", action="store_true", help="leave inconsistent bitmaps out of what bitmaps take"
    )
    parser.add_argument(
        "--name",
        metavar="FILE",
        default="new-image",
        help="the name of the image: a VMDK of several files has it in its descriptor, and -b starts at its folder",
    )
    add_json_option(parser)
    add_progress_options(parser)
    add_target_options(parser, "target-", secret=False)
    add_source_options(parser)
    add_qemu_words(parser, "-T")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure it, and print what was found."""
    if wants_help(arguments):
        return print_options(arguments.target_format)
    take_backing_options(arguments, _PROGRAM)
    _check(arguments)
    arguments.direct = arguments.direct or is_direct(arguments.cache_T)
    with ExitStack() as stack:
        images = [stack.enter_context(open_image(arguments, path=path)) for path in arguments.sources]
        _print(_measured(arguments, images), json=arguments.json)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    if bool(arguments.sources) == (arguments.size is not None):
        raise UsageError("either SOURCE or --size is needed, and not both", _PROGRAM)
    if arguments.size is not None and arguments.sparse_size is not None:
        raise UsageError("-S goes with a SOURCE", _PROGRAM)
    check_copied(arguments, arguments.sources, _PROGRAM)


def _measured(arguments: argparse.Namespace, images: list[Image]) -> Measured:
    from tapfs.jobs.bitmap_copy import bitmaps_if_any
    from tapfs.jobs.copying import CopyOptions
    from tapfs.jobs.measure import measure
    from tapfs.jobs.sources import one_disk

    source = one_disk(images) if images else None
    size = arguments.size if source is None else source.size
    new = plain_new_image_of(arguments, format_name=arguments.target_format, size=size, program=_PROGRAM)
    encrypted = wants_encryption(arguments, arguments.target_format)
    new = replace(new, compressed=arguments.compress, password=_ANY_PASSWORD if encrypted else None)
    bitmaps = None
    if len(images) == 1 and arguments.snapshot is None:
        bitmaps = bitmaps_if_any(images[0], skip_broken=arguments.skip_broken_bitmaps)
    with progress_of(arguments, "measure") as progress:
        return measure(
            source,
            new,
            name=arguments.name,
            options=CopyOptions(sparse_bytes=arguments.sparse_size),
            bitmaps=bitmaps,
            progress=progress,
        )


def _print(found: Measured, *, json: bool) -> None:
    if json:
        from tapfs.cli.json_output import print_json

        told = {"required": found.required, "fully-allocated": found.fully_allocated}
        print_json(told if found.bitmaps is None else {**told, "bitmaps": found.bitmaps})
        return
    print_line(f"required size: {found.required}")
    print_line(f"fully allocated size: {found.fully_allocated}")
    if found.bitmaps is not None:
        print_line(f"bitmaps size: {found.bitmaps}")
