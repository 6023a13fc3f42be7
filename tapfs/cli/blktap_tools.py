"""The blktap project's own tools, with their argument order: qcow-create, img2qcow, qcow2raw.

docs/specs/blktap-qcow.md, "The original tools", describes the originals and their faults. The tools here write the
layout that the blktap drivers read, and their exit code says when they fail.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from typing import TYPE_CHECKING

from tapfs.cli.guard import guarded
from tapfs.cli.parser import Parser, UsageError, format_argument
from tapfs.cli.sandboxed import enter_for
from tapfs.disk.password import PASSWORD_VARIABLE
from tapfs.errors import ErrorKind, ImageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tapfs.disk.image import Image
    from tapfs.jobs.create import NewImage

#: The layout of the blktap tools (`tapfs create -f qcow -o help`).
_BLKTAP = {"blktap": "on"}
_SECTOR = 512
_DESTINATION_FIRST = "Note the order: the DESTINATION comes first."


def qcow_create(argv: list[str] | None = None) -> int:
    """``qcow-create [-r] [-f FORMAT] SIZE_MB FILE [BACKING]``."""
    return guarded("qcow-create", lambda: _advised(partial(_qcow_create, owned=argv is None), _words(argv)))


def img2qcow(argv: list[str] | None = None) -> int:
    """``img2qcow DEST SRC``."""
    return guarded("img2qcow", lambda: _advised(partial(_img2qcow, owned=argv is None), _words(argv)))


def qcow2raw(argv: list[str] | None = None) -> int:
    """``qcow2raw DEST SRC``."""
    return guarded("qcow2raw", lambda: _advised(partial(_qcow2raw, owned=argv is None), _words(argv)))


def _advised(tool: Callable[[list[str]], int], words: list[str]) -> int:
    """Run a tool; what an error advises names no option that these tools do not have."""
    try:
        return tool(words)
    except ImageError as error:
        if error.op == "unlock":
            error.remedy = f"set {PASSWORD_VARIABLE}"
        elif error.neutral_remedy is not None and "{" in error.neutral_remedy:
            error.remedy = f"with tapfs convert: {error.remedy}"
        raise


def _words(argv: list[str] | None) -> list[str]:
    return sys.argv[1:] if argv is None else argv


def qcow_create_parser() -> Parser:
    """The parser of `qcow-create`."""
    parser = Parser(
        prog="qcow-create",
        description="Make the empty qcow image FILE of SIZE_MB MiB in blktap's layout. With BACKING it is an overlay:\n"
        "it reads as BACKING until it is written to, and is SIZE_MB large all the same.\n"
        "An existing FILE that is not empty is left alone.",
    )
    parser.add_argument("-r", action="store_true", help="reserve the space of the whole disk now")
    parser.add_argument(
        "-f", dest="format", metavar="FORMAT", type=format_argument, default="qcow", help="image format (default: qcow)"
    )
    parser.add_argument("size", metavar="SIZE_MB", help="MiB of its disk")
    parser.add_argument("image", metavar="FILE", help="the new image")
    parser.add_argument("backing", metavar="BACKING", nargs="?", help="parent of the new image")
    return parser


def img2qcow_parser() -> Parser:
    """The parser of `img2qcow`."""
    return _copy_parser(
        "img2qcow",
        "Copy the raw disk SRC into the new qcow image DEST in blktap's layout. Zeros take no space.\n"
        f"{_DESTINATION_FIRST} A partial last sector is kept: the disk is rounded up.",
    )


def qcow2raw_parser() -> Parser:
    """The parser of `qcow2raw`."""
    return _copy_parser(
        "qcow2raw",
        "Copy the disk in the qcow image SRC (and its parents) into the new raw file or block device DEST.\n"
        f"{_DESTINATION_FIRST} What was never written reads as zeros.",
    )


def _copy_parser(program: str, description: str) -> Parser:
    parser = Parser(prog=program, description=description)
    parser.add_argument("destination", metavar="DEST", help="what is written: replaced when the copy is complete")
    parser.add_argument("source", metavar="SRC", help="what is read")
    return parser


def _qcow_create(words: list[str], *, owned: bool) -> int:
    parser = qcow_create_parser()
    arguments = parser.parse(words)
    if not (arguments.size.isascii() and arguments.size.isdigit() and 0 < int(arguments.size[:20]) < 1 << 43):
        raise UsageError(f"SIZE_MB is a number of MiB, not {arguments.size!r}", parser.prog)
    if arguments.r and arguments.backing is not None:
        raise UsageError("-r reserves a whole disk, an overlay has none", parser.prog)
    from tapfs.jobs.create import NewImage, create_image

    options = (_BLKTAP if arguments.format == "qcow" else {}) | ({"reserve": "on"} if arguments.r else {})
    # The original wrote the real path of the parent into the image, so a relative name may be given.
    backing = None if arguments.backing is None else os.path.realpath(arguments.backing)
    new = NewImage(format=arguments.format, size=int(arguments.size) << 20, backing=backing, options=options)
    if owned:
        enter_for("create", argparse.Namespace(image=arguments.image, backing=backing, no_sandbox=False))
    try:
        create_image(arguments.image, new)
    except ImageError as error:
        if error.kind is ErrorKind.EXISTS:
            error.remedy = "remove it first if it is not needed"
        raise
    return 0


def _img2qcow(words: list[str], *, owned: bool) -> int:
    arguments = img2qcow_parser().parse(words)
    _enter_for_copy(arguments, owned=owned)
    from tapfs.cli.options import chain_was_opened
    from tapfs.disk.chain import OpenOptions
    from tapfs.disk.format_choice import require_raw
    from tapfs.disk.opening import open_image
    from tapfs.jobs.create import NewImage

    require_raw(arguments.source)
    with open_image(arguments.source, OpenOptions(format="raw")) as source:
        chain_was_opened(source)
        size = -(-source.size // _SECTOR) * _SECTOR
        _copy(source, arguments.destination, NewImage(format="qcow", size=size, options=_BLKTAP), "img2qcow")
    return 0


def _qcow2raw(words: list[str], *, owned: bool) -> int:
    arguments = qcow2raw_parser().parse(words)
    _enter_for_copy(arguments, owned=owned)
    from tapfs.cli.options import opened
    from tapfs.disk.chain import OpenOptions
    from tapfs.disk.opening import open_image
    from tapfs.jobs.create import NewImage

    def attempt(password: bytes | None) -> Image:
        return open_image(arguments.source, OpenOptions(format="qcow"), password=password)

    arguments.key_file = None
    with opened(arguments, arguments.source, attempt) as source:
        _copy(source, arguments.destination, NewImage(format="raw", size=source.size), "qcow2raw")
    return 0


def _enter_for_copy(arguments: argparse.Namespace, *, owned: bool) -> None:
    """Give up what a conversion does not need."""
    if owned:
        names = [arguments.source, arguments.destination]
        words = argparse.Namespace(names=names, no_create=False, target_backing=None, no_sandbox=False)
        enter_for("convert", words)


def _copy(source: Image, destination: str, new: NewImage, program: str) -> None:
    from tapfs.cli.progress import Progress
    from tapfs.jobs.convert import convert_to_new

    with Progress(program) as progress:
        convert_to_new(source, destination, new, progress=progress)
