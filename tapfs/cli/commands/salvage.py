"""`tapfs salvage`: copy a damaged image by what a scan of its file finds, where its own metadata is lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.cli.json_output import print_json
from tapfs.cli.options import add_image_options, chain_was_opened, open_options, unlocked
from tapfs.cli.parser import UsageError, format_argument, size_argument
from tapfs.cli.reporting import add_json_option, add_progress_options, print_line, progress_of
from tapfs.cli.salvaged_ranges import EXIT_SALVAGED, tell_lost
from tapfs.cli.sizes import human_size
from tapfs.cli.targets import add_target_options, default_format, new_image_of, print_options, wants_help
from tapfs.records import replace

if TYPE_CHECKING:
    import argparse

    from tapfs.cli.parser import Subparsers
    from tapfs.jobs.salvage import Salvaged
    from tapfs.jobs.sources import Salvaged as SalvagedSource

_PROGRAM = "tapfs salvage"


def add_parser(subparsers: Subparsers) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "salvage",
        help="copy a damaged image by what a scan of its file finds",
        description="Scan the file of IMAGE for the tables that its header and its other tables do not lead to any\n"
        "more, and copy the disk that they make into the new image TARGET. IMAGE is only read.\n"
        "What was rebuilt, and from what, is said on standard output; what could not be found, or was guessed, and\n"
        "each range of the disk that became zeros, on stderr. An image in good order is copied as by 'tapfs convert'.\n"
        "Where the start of the file is lost, -f has to say the format.\n"
        "Exit code: 0 all was found; 1 a part became zeros or is doubtful; others: 'tapfs --help'.",
    )
    parser.usage = "tapfs salvage [options] IMAGE TARGET\n       tapfs salvage --dry-run [options] IMAGE"
    parser.add_argument("image", metavar="IMAGE", help="the damaged image")
    parser.add_argument("target", metavar="TARGET", nargs="?", help="the new image: a file name")
    parser.add_argument(
        "-O", "--target-format", metavar="FMT", type=format_argument, help="format of TARGET (default: raw)"
    )
    parser.add_argument("--dry-run", action="store_true", help="scan, and say what was found")
    scan = parser.add_argument_group("what you know of the image")
    scan.add_argument("--size", metavar="SIZE", type=size_argument, help="bytes of the disk, if the header is lost")
    scan.add_argument(
        "--cluster-size",
        metavar="SIZE",
        type=size_argument,
        help="its clusters (grains, blocks), if the header is lost",
    )
    scan.add_argument(
        "--in-order",
        action="store_true",
        help="put tables that nothing names where one is missing, in the order of the file: a guess, which is right for"
        " disks that were written from their start to their end",
    )
    parser.add_argument(
        "--unplaced",
        metavar="FILE",
        help="write what of IMAGE no table names into the new file FILE, for programs that look for files in it",
    )
    add_json_option(parser)
    add_progress_options(parser)
    add_target_options(parser, "target-")
    add_image_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Scan it, say what was found, copy it."""
    if wants_help(arguments):
        return print_options(arguments.target_format or "raw")
    if arguments.dry_run == (arguments.target is not None):
        raise UsageError("name a TARGET, or say --dry-run", _PROGRAM)
    if arguments.dry_run and arguments.unplaced is not None:
        raise UsageError("--dry-run writes nothing, so --unplaced does not go with it", _PROGRAM)
    if arguments.target is not None:
        arguments.target_format = arguments.target_format or default_format(arguments.target, "-O")
    salvaged = _opened(arguments)
    with salvaged.image as image:
        if not arguments.json:
            _print_found(salvaged)
        lost = None if arguments.target is None else _copy(arguments, salvaged)
        written = None if arguments.unplaced is None else _write_unplaced(arguments, salvaged)
        if arguments.json:
            print_json(
                {
                    "path": image.path,
                    "size": image.size,
                    "rebuilt": list(salvaged.found.rebuilt),
                    "doubts": list(salvaged.found.doubts),
                    "unplaced": salvaged.found.unplaced_bytes,
                    "unplaced_written": written,
                    "lost": None if lost is None else [_as_json(*each) for each in lost.lost],
                }
            )
        doubtful = EXIT_SALVAGED if salvaged.found.doubts else 0
        return doubtful if lost is None else max(doubtful, tell_lost(lost))


def _opened(arguments: argparse.Namespace) -> Salvaged:
    from tapfs.jobs.salvage import open_salvaged
    from tapfs.salvage import SalvageRequest

    backing = None
    if arguments.backing is not None:
        from tapfs.driver import BackingReference

        formats: list[str] = arguments.backing_format
        backing = BackingReference(arguments.backing, formats[0] if formats else None)
    with progress_of(arguments, "scan") as progress:
        request = SalvageRequest(
            virtual_size=arguments.size,
            cluster_bytes=arguments.cluster_size,
            backing=backing,
            in_order=arguments.in_order,
            progress=progress,
        )
        options = replace(open_options(arguments), salvage=request, cut=True)
        name: str = arguments.image
        salvaged = unlocked(arguments.key_file, name, lambda password: open_salvaged(name, options, password=password))
    chain_was_opened(salvaged.image)
    return salvaged


def _print_found(salvaged: Salvaged) -> None:
    from tapfs.cli.guard import complain
    from tapfs.errors import printable

    found = salvaged.found
    for text in found.rebuilt:
        print_line(f"rebuilt: {text}")
    if not found.rebuilt:
        print_line("nothing had to be rebuilt")
    if found.unplaced:
        unplaced = human_size(found.unplaced_bytes)
        print_line(f"no table names {unplaced} of the file, in {len(found.unplaced)} ranges (--unplaced)")
    for text in found.doubts:
        complain("tapfs", f"{printable(salvaged.image.path)}: {text}")


def _copy(arguments: argparse.Namespace, salvaged: Salvaged) -> SalvagedSource:
    from tapfs.jobs.convert import convert_to_new, refuse_own_chain
    from tapfs.jobs.sources import Salvaged as SalvagedSource

    refuse_own_chain(salvaged.image, arguments.target)
    source = SalvagedSource(salvaged.image)
    own: str | None = arguments.target_key_file
    new = new_image_of(
        arguments,
        arguments.target,
        format_name=arguments.target_format,
        size=source.size,
        key_file=arguments.key_file if own is None else [own],
        program=_PROGRAM,
    )
    with progress_of(arguments, "salvage") as progress:
        convert_to_new(source, arguments.target, new, progress=progress)
    return source


def _write_unplaced(arguments: argparse.Namespace, salvaged: Salvaged) -> int:
    from tapfs.jobs.output_file import output_file
    from tapfs.jobs.salvage import copy_unplaced

    image = salvaged.image
    with output_file(arguments.unplaced, [image], overwrite=False, op="write what no table names") as file:
        return copy_unplaced(image.layers[0].file, salvaged.found.unplaced, file)


def _as_json(place: tuple[int, int], error: Exception) -> dict[str, object]:
    return {"offset": place[0], "length": place[1], "message": str(error)}
