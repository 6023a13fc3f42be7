"""`tapfs dd`: copy a part of a disk into a new image, by the words of dd(1)."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from tapfs.cli.options import add_source_options, open_image
from tapfs.cli.parser import UsageError, format_argument, size_argument
from tapfs.cli.qemu_words import add_qemu_words, is_direct
from tapfs.cli.reporting import add_progress_options, progress_of
from tapfs.cli.sizes import whole_number
from tapfs.cli.targets import default_format

if TYPE_CHECKING:
    from tapfs.cli.parser import Subparsers

_PROGRAM = "tapfs dd"
_BLOCK = 512
_SIZES = ("bs", "isize", "osize")
_NUMBERS = ("count", "skip")


def add_parser(subparsers: Subparsers) -> None:
    """Describe the command."""
    parser = subparsers.add_parser(
        "dd",
        help="copy a part of a disk into a new image",
        description="Copy COUNT blocks of the disk of IMAGE, from block SKIP on, into the new image TARGET. What a\n"
        "guest reads is copied, in whatever format; zeros take no space. TARGET appears, or replaces what was\n"
        "there, only when it is complete and durable.\n"
        "As in dd(1) count= counts what is copied. (qemu-img takes skip= off it.)",
    )
    parser.usage = "tapfs dd [options] if=IMAGE of=TARGET [bs=SIZE] [count=COUNT] [skip=SKIP] [isize=SIZE] [osize=SIZE]"
    parser.add_argument(
        "operands",
        metavar="WORD=VALUE",
        nargs="*",
        help="bs: bytes of a block (512); isize: as if the disk of IMAGE were so long; osize: bytes of TARGET's disk",
    )
    parser.add_argument(
        "-O", "--target-format", metavar="FMT", type=format_argument, help="format of TARGET (default: raw)"
    )
    add_progress_options(parser)
    add_source_options(parser)
    add_qemu_words(parser, "-T")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Copy it."""
    words = _words(arguments.operands)
    if "if" not in words or "of" not in words:
        raise UsageError("if=IMAGE and of=TARGET are needed", _PROGRAM)
    sizes = {name: _size(name, words[name]) for name in _SIZES if name in words}
    numbers = {name: _number(name, words[name]) for name in _NUMBERS if name in words}
    block = sizes.get("bs", _BLOCK)
    if not block:
        raise UsageError("bs=0 is no size of a block", _PROGRAM)
    arguments.image, target = words["if"], words["of"]
    arguments.direct = arguments.direct or is_direct(arguments.cache_T)
    format_name = arguments.target_format or default_format(target, "-O")
    from tapfs.jobs.convert import convert_to_new, refuse_own_chain
    from tapfs.jobs.create import NewImage
    from tapfs.jobs.sources import Part

    with open_image(arguments) as image:
        refuse_own_chain(image, target)
        end = min(image.size, sizes.get("isize", image.size))
        start = numbers.get("skip", 0) * block
        if start > end:
            raise UsageError(f"skip={numbers['skip']} is behind the end of the disk, which has {end} bytes", _PROGRAM)
        length = min(end - start, numbers["count"] * block if "count" in numbers else end)
        size = sizes.get("osize", length)
        part = Part(image, start, min(length, size))
        with progress_of(arguments, "dd") as progress:
            convert_to_new(part, target, NewImage(format_name, size), progress=progress)
    return 0


def _words(operands: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for operand in operands:
        word, equals, value = operand.partition("=")
        if not equals or word not in ("if", "of", *_SIZES, *_NUMBERS):
            raise UsageError(f"{operand!r} is none of if=, of=, bs=, count=, skip=, isize= and osize=", _PROGRAM)
        if word in found:
            raise UsageError(f"{word}= is said twice", _PROGRAM)
        found[word] = value
    return found


def _size(word: str, text: str) -> int:
    try:
        return size_argument(text)
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"{word}={text}: {error}", _PROGRAM) from None


def _number(word: str, text: str) -> int:
    try:
        return whole_number(text)
    except ValueError as error:
        raise UsageError(f"{word}= must be a number of blocks: {error}", _PROGRAM) from None
