"""`tapfs rebase`: give an image another backing file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.cli.options import add_changed_image_options, open_options, unlocked
from tapfs.cli.parser import format_argument
from tapfs.cli.qemu_words import add_qemu_words, is_direct
from tapfs.cli.reporting import add_json_option, add_progress_options, print_line, progress_of
from tapfs.records import replace

if TYPE_CHECKING:
    import argparse

    from tapfs.cli.parser import Subparsers

_DESCRIPTION = """\
Have the image FILE name another backing file, or none (-b ""). The disk stays the same: what the new backing
file has otherwise is written into FILE first. FILE reads the same at every moment, so a rebase that was
interrupted is begun anew.

With -u only the name changes, as after a backing file was moved: FILE then shows whatever that has.
A relative name starts at the folder of FILE."""


def add_parser(subparsers: Subparsers) -> None:
    """Describe the command."""
    parser = subparsers.add_parser("rebase", help="give an image another backing file", description=_DESCRIPTION)
    parser.add_argument("image", metavar="FILE", help="the image")
    parser.add_argument(
        "-b",
        "--backing",
        dest="new_backing",
        metavar="BACKING",
        required=True,
        help='the new backing file, as it is to be written into FILE; "": none',
    )
    parser.add_argument(
        "-F",
        "-B",
        dest="new_backing_formats",
        metavar="FMT",
        type=format_argument,
        action="append",
        default=[],
        help="format of BACKING (else what its contents show); given again, that of its own backing file, and so on",
    )
    parser.add_argument("-u", "--unsafe", action="store_true", help="change the name alone; BACKING need not be there")
    parser.add_argument("-c", "--compress", action="store_true", help="compress what is written into FILE")
    add_json_option(parser)
    add_progress_options(parser)
    add_changed_image_options(parser)
    add_qemu_words(parser, "-t", "-T")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Rebase it, and say what had to be written."""
    from tapfs.cli.json_output import print_json
    from tapfs.jobs.rebase import rebase_image

    options = open_options(arguments)
    options = replace(options, direct=options.direct or is_direct(arguments.cache_t) or is_direct(arguments.cache_T))
    with progress_of(arguments, "rebase") as progress:
        done = unlocked(
            arguments.key_file,
            arguments.image,
            lambda password: rebase_image(
                arguments.image,
                options,
                arguments.new_backing,
                backing_formats=arguments.new_backing_formats,
                unsafe=arguments.unsafe,
                compressed=arguments.compress,
                password=password,
                progress=progress,
            ),
        )
    if arguments.json:
        print_json(done._asdict())
    elif not arguments.quiet:
        name = "no backing file" if done.backing is None else f"the backing file {done.backing}"
        print_line(f"Rebased to {name}: {done.data_bytes} bytes of data were written.")
    return 0
