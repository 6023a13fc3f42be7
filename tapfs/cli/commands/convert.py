"""`tapfs convert`: copy an image into another format."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from tapfs.cli.batch_options import add_batch_options, refuse_batch_options
from tapfs.cli.options import add_source_options, cache_bytes_of, open_image, unlocked
from tapfs.cli.parser import UsageError, add_rate_option, format_argument
from tapfs.cli.pipes import STREAM, add_spool_option, check_piped, standard_input_ready, standard_output, told_scratch
from tapfs.cli.qemu_words import add_qemu_words, is_direct
from tapfs.cli.reporting import add_progress_options, progress_of
from tapfs.cli.salvaged_ranges import tell_lost
from tapfs.cli.targets import (
    add_sparse_size_option,
    add_target_options,
    check_copied,
    default_format,
    new_image_of,
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
    from tapfs.jobs.bitmap_copy import CopiedBitmaps
    from tapfs.jobs.convert import CopyOptions
    from tapfs.jobs.create import NewImage
    from tapfs.jobs.sources import Salvaged, Source

_PROGRAM = "tapfs convert"

#: Options of a new image, each with what to use in its place for one that is there.
_FOR_NEW_ONES = {
    "compress": "leave out -c, or leave out -n for a new TARGET that is packed",
    "target_backing": "leave out -b, it keeps the parent that it has; tapfs rebase gives it another",
    "options": "leave out -o; tapfs amend changes what can be changed of one",
    "encrypt": "leave out --encrypt; whether it is encrypted is decided when it is made",
}
_SCRATCH = "the image is made in {} first, because its packed or encrypted data is not written in order"


def add_parser(subparsers: Subparsers) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "convert",
        help="copy an image into another format",
        description="Copy what a guest reads from SOURCE into the new image TARGET. Zeros take no space.\n"
        "Several SOURCEs become one disk, one behind the other.\n"
        "TARGET appears under its name, and replaces what was there, only when it is complete and durable:\n"
        "an interrupted or failed convert changes nothing. A block device is written in place, without a question,\n"
        "and what lies behind the end of the image on it is left as it is. An empty file that cannot be replaced,\n"
        "such as a container's volume, is written in place, too.\n"
        "- is standard input as SOURCE and standard output as TARGET, which may be pipes: docs/streams.md tells more.\n"
        "With -b only what differs from that parent is written.",
    )
    parser.usage = "tapfs convert [options] SOURCE [SOURCE ...] TARGET"
    parser.add_argument(
        "names",
        metavar="SOURCE ... TARGET",
        nargs="*",
        help="TARGET: a file name, a block device, ram:NAME, an address (nbd://, rbd:), or - for standard output",
    )
    parser.add_argument(
        "-O",
        "--target-format",
        metavar="FMT",
        type=format_argument,
        help="format of TARGET (default: raw; with -n what TARGET shows, but raw must be named)",
    )
    parser.add_argument("-c", "--compress", action="store_true", help="compress TARGET")
    parser.add_argument(
        "-n",
        "--no-create",
        action="store_true",
        help="write into the existing disk TARGET; zeros are written, too, up to its end unless it is a device",
    )
    parser.add_argument(
        "--target-is-zero", action="store_true", help="with -n: TARGET reads as zeros, which need not be written"
    )
    parser.add_argument(
        "--salvage",
        action="store_true",
        help="what cannot be read becomes zeros, is named on stderr, and makes the exit code 1",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read TARGET back from the host's disk and compare it with SOURCE, before a new TARGET has its name",
    )
    add_sparse_size_option(parser, zero="write them all")
    add_rate_option(parser, "write")
    parser.add_argument("-m", "--parallel", metavar="N", type=int, help="read with at most N threads")
    parser.add_argument(
        "--bitmaps", action="store_true", help="copy the bitmaps of SOURCE, too, into a TARGET that can keep them"
    )
    parser.add_argument(
        "--skip-broken-bitmaps", action="store_true", help="with --bitmaps: leave out those that are inconsistent"
    )
    add_spool_option(parser)
    add_batch_options(parser, line="SOURCE TARGET with options of their own")
    parser.add_argument("--json", action="store_true", help="with --batch: print JSON")
    add_progress_options(parser)
    add_target_options(parser, "target-")
    add_source_options(parser)
    add_qemu_words(parser, "-T", "-t", target_options=True)
    for letter, name, meaning in (
        ("-W", "--oob-writes", "TARGET is written in the order of the disk, as fast as without"),
        ("-C", "--copy-range-offloading", "a raw TARGET shares the blocks of its source where the host can, anyway"),
    ):
        parser.add_argument(letter, name, action="store_true", help=f"accepted: {meaning}")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Copy it."""
    names: list[str] = arguments.names
    if arguments.batch is not None:
        if names:
            raise UsageError("--batch has SOURCE and TARGET in its list", _PROGRAM)
        from tapfs.cli.batch import Kind, first_failure, run_batch

        return run_batch(arguments, Kind("convert", frozenset({0}), first_failure), add_parser)
    refuse_batch_options(arguments, _PROGRAM)
    if arguments.json:
        raise UsageError("--json goes with --batch", _PROGRAM)
    sources, target = names[:-1], names[-1] if names else None
    arguments.image, arguments.target = sources[0] if sources else None, target
    if not sources and not wants_help(arguments):
        raise UsageError("SOURCE and TARGET are needed", _PROGRAM)
    if not arguments.no_create or wants_help(arguments):  # what is there already is what its contents show
        arguments.target_format = arguments.target_format or default_format(target or "", "-O")
    if wants_help(arguments):
        return print_options(arguments.target_format)
    take_backing_options(arguments, _PROGRAM)
    _check(arguments, sources)
    arguments.direct = arguments.direct or is_direct(arguments.cache_T)
    if STREAM in sources:
        from tapfs.cli.raw_pipe import pass_on

        if pass_on(arguments, sources, _copy_options(arguments), _PROGRAM):
            return 0
    with ExitStack() as stack:
        stack.enter_context(standard_input_ready(arguments, sources))
        images = [stack.enter_context(open_image(arguments, path=path)) for path in sources]
        source, salvaged = _source_of(images, salvage=arguments.salvage)
        if arguments.no_create:
            _into_existing(arguments, images, source)
        else:
            _into_new(arguments, images, source)
        return 0 if salvaged is None else tell_lost(salvaged)


def _check(arguments: argparse.Namespace, sources: list[str]) -> None:
    for name, remedy in _FOR_NEW_ONES.items() if arguments.no_create else ():
        if getattr(arguments, name):
            raise UsageError(f"-n writes into an image as it is: {remedy}", _PROGRAM)
    encrypts = arguments.no_create or wants_encryption(arguments, arguments.target_format)
    if arguments.target_key_file is not None and not encrypts:
        raise UsageError("--target-key-file goes with --encrypt or -n", _PROGRAM)
    if arguments.target_is_zero and not arguments.no_create:
        raise UsageError("--target-is-zero goes with -n: a new image reads as zeros anyway", _PROGRAM)
    check_copied(arguments, sources, _PROGRAM)
    check_piped(arguments, sources, _PROGRAM)
    if arguments.skip_broken_bitmaps and not arguments.bitmaps:
        raise UsageError("--skip-broken-bitmaps goes with --bitmaps", _PROGRAM)
    if arguments.bitmaps and (len(sources) > 1 or arguments.snapshot is not None):
        raise UsageError("--bitmaps goes with one SOURCE and its current disk", _PROGRAM)
    if arguments.verify and arguments.target == STREAM:
        raise UsageError("--verify reads TARGET back, which a pipe does not allow", _PROGRAM)
    if arguments.parallel is not None and arguments.parallel < 1:
        raise UsageError("-m needs a number from 1 on", _PROGRAM)


def _source_of(images: list[Image], *, salvage: bool) -> tuple[Source, Salvaged | None]:
    """The disk that is copied, and the same one where it notes what could not be read."""
    from tapfs.jobs.sources import Salvaged, one_disk

    source = one_disk(images)
    if not salvage:
        return source, None
    salvaged = Salvaged(source)
    return salvaged, salvaged


def _copy_options(arguments: argparse.Namespace) -> CopyOptions:
    from tapfs.jobs.convert import CopyOptions

    return CopyOptions(rate=arguments.rate_limit, workers=arguments.parallel, sparse_bytes=arguments.sparse_size)


def _into_new(arguments: argparse.Namespace, images: list[Image], source: Source) -> None:
    from tapfs.jobs.convert import convert_to_new, refuse_own_chain

    for image in images:
        if arguments.target != STREAM:
            refuse_own_chain(image, arguments.target)
    new = new_image_of(
        arguments,
        arguments.target,
        format_name=arguments.target_format,
        size=source.size,
        key_file=_target_keys(arguments),
        program=_PROGRAM,
    )
    if arguments.target == STREAM:
        _into_pipe(arguments, source, new)
        return
    bitmaps = _bitmaps_of(arguments, images[0])
    with progress_of(arguments, "convert") as progress:
        convert_to_new(
            source,
            arguments.target,
            new,
            compressed=arguments.compress,
            options=_copy_options(arguments),
            bitmaps=bitmaps,
            verified=arguments.verify,
            progress=progress,
        )


def _target_keys(arguments: argparse.Namespace) -> list[str] | None:
    """The key files for the target and its parents: --target-key-file is the target's, and theirs where no other is."""
    key_files: list[str] | None = arguments.key_file
    own: str | None = arguments.target_key_file
    return key_files if own is None else [own, *(key_files or []), f"{arguments.target}={own}"]


def _into_pipe(arguments: argparse.Namespace, source: Source, new: NewImage) -> None:
    from tapfs.jobs.streamed_image import write_image

    with progress_of(arguments, "convert") as progress:
        write_image(
            source,
            replace(new, compressed=arguments.compress),
            standard_output(),
            name=f"disk.{new.format}",
            options=_copy_options(arguments),
            progress=progress,
            on_scratch=told_scratch(_SCRATCH, arguments),
        )


def _bitmaps_of(arguments: argparse.Namespace, source: Image) -> CopiedBitmaps | None:
    """The bitmaps that are to be copied; says which of them are left out."""
    if not arguments.bitmaps:
        return None
    from tapfs.cli.guard import complain
    from tapfs.errors import printable
    from tapfs.jobs.bitmap_copy import bitmaps_to_copy

    copied = bitmaps_to_copy(source, skip_broken=arguments.skip_broken_bitmaps)
    for name in copied.skipped:
        complain("tapfs", f"{printable(source.path)}: bitmap {name!r} is inconsistent and was left out")
    return copied


def _into_existing(arguments: argparse.Namespace, images: list[Image], source: Source) -> None:
    from tapfs.disk import opening
    from tapfs.disk.chain import OpenOptions
    from tapfs.jobs.convert import Baseline, convert, refuse_own_chain, require_copied

    for image in images:
        refuse_own_chain(image, arguments.target)
    options = OpenOptions(
        format=arguments.target_format,
        writable=True,
        direct=arguments.direct or is_direct(arguments.cache_t),
        write_base=arguments.write_base,
        cache_bytes=cache_bytes_of(arguments),
        say_raw="say {target_format=raw}",
    )

    def opened(options: OpenOptions) -> Image:
        return unlocked(
            _target_keys(arguments),
            arguments.target,
            lambda password: opening.open_image(arguments.target, options, password=password),
        )

    bitmaps = _bitmaps_of(arguments, images[0])
    with opened(options) as target, progress_of(arguments, "convert") as progress:
        if bitmaps is not None:
            bitmaps.require_room(target)
        baseline = Baseline.ZEROS if arguments.target_is_zero else Baseline.ANYTHING
        convert(source, target, baseline=baseline, options=_copy_options(arguments), progress=progress)
        format_name = target.format_name
    if bitmaps is not None:
        bitmaps.into_file(arguments.target, replace(options, format=format_name))
    if arguments.verify:
        with (
            opened(replace(options, format=format_name, writable=False)) as written,
            progress_of(arguments, "verify") as progress,
        ):
            require_copied(source, written, progress)
