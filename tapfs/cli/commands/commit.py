"""`tapfs commit`: write what an overlay holds into its base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.cli.guests.device import add_copied_disk_options, names_device
from tapfs.cli.options import add_changed_image_options, open_options, unlocked
from tapfs.cli.parser import UsageError, add_rate_option
from tapfs.cli.qemu_words import add_qemu_words, is_direct
from tapfs.cli.reporting import add_json_option, add_progress_options, print_line, progress_of
from tapfs.records import replace

if TYPE_CHECKING:
    import argparse

    from tapfs.cli.parser import Subparsers

_PROGRAM = "tapfs commit"

_DESCRIPTION = """\
Write what the overlay FILE holds into its backing file, whatever the two formats are, and empty FILE.
FILE reads the same at every moment and afterwards, so a commit that was interrupted is begun anew.
A backing file that is smaller than FILE grows. Nobody may use an image of the chain meanwhile.

With --domain and --vdev it is the disk of a guest that goes on using it, with --ublk a block device. The disk
is the backing file alone afterwards, which has its name then, and the overlay is gone. Ctrl-C ends it, and
nothing has changed. With --keep-names each file keeps its name, and the overlay stays, empty.

With -b the data goes to BASE, further down the chain, and FILE keeps what it holds. The images between
the two, and every other overlay over BASE, then read senseless data by themselves."""


def add_parser(subparsers: Subparsers) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "commit", help="write what an overlay holds into its backing file", description=_DESCRIPTION
    )
    parser.usage = (
        "tapfs commit [options] FILE\n       tapfs commit [options] --domain D --vdev V\n"
        "       tapfs commit [options] --ublk DEV"
    )
    parser.add_argument("image", metavar="FILE", nargs="?", help="the overlay")
    add_copied_disk_options(parser)
    parser.add_argument("--keep-names", action="store_true", help="of a disk in use: change no name")
    parser.add_argument(
        "-b", "--base", metavar="BASE", help="the image of the chain to write to (the backing file of FILE); implies -d"
    )
    parser.add_argument("-d", "--drop", action="store_true", help="do not empty FILE: it is about to be deleted")
    add_rate_option(parser, "write")
    add_json_option(parser)
    add_progress_options(parser)
    add_changed_image_options(parser)
    add_qemu_words(parser, "-t")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Commit it, and say where to."""
    in_use = names_device(arguments, _PROGRAM)
    if (arguments.image is not None) == in_use:
        raise UsageError("say either FILE, or a disk in use: --domain and --vdev, or --ublk", _PROGRAM)
    return _disk_in_use(arguments) if in_use else _image(arguments)


def _disk_in_use(arguments: argparse.Namespace) -> int:
    from tapfs.cli.guests.live_job import do_live_job
    from tapfs.cli.json_output import print_json

    if arguments.base is not None or arguments.drop:
        raise UsageError("-b and -d are for an image that nobody uses", _PROGRAM)
    with progress_of(arguments, "commit") as progress:
        done = do_live_job(arguments, "commit", progress, rate=arguments.rate_limit, keep_names=arguments.keep_names)
    if arguments.json:
        print_json({"base": done["base"], "data_bytes": done["data_bytes"], "emptied": True, "invalid": []})
    elif not arguments.quiet:
        print_line(f"Committed to {done['base']}: {done['data_bytes']} bytes of data.")
    return 0


def _image(arguments: argparse.Namespace) -> int:
    if arguments.keep_names:
        raise UsageError("--keep-names is for a disk in use", _PROGRAM)
    from tapfs.cli.guard import complain
    from tapfs.cli.json_output import print_json
    from tapfs.jobs.commit import commit_image

    options = open_options(arguments)
    options = replace(options, direct=options.direct or is_direct(arguments.cache_t))
    with progress_of(arguments, "commit") as progress:
        done = unlocked(
            arguments.key_file,
            arguments.image,
            lambda password: commit_image(
                arguments.image,
                options,
                base=arguments.base,
                keep=arguments.drop,
                rate=arguments.rate_limit,
                password=password,
                progress=progress,
            ),
        )
    for path in done.invalid:
        complain("tapfs", f"{path} is of no use by itself any more: what is above it was written below it")
    if arguments.json:
        print_json({**done._asdict(), "invalid": list(done.invalid)})
    elif not arguments.quiet:
        print_line(f"Committed to {done.base}: {done.data_bytes} bytes of data.")
    return 0
