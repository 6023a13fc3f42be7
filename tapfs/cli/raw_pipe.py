"""A raw disk on standard input, which `tapfs convert` passes on as it comes: no scratch file is needed for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.cli.pipes import STREAM, standard_output
from tapfs.cli.targets import plain_new_image_of, wants_encryption
from tapfs.host import standard_input

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from tapfs.jobs.copying import CopyOptions


def pass_on(arguments: argparse.Namespace, sources: Sequence[str], options: CopyOptions, program: str) -> bool:
    """Make the target of standard input, if that is a raw disk in a pipe and the target can be made so.

    Whether it was made; if it was not, nothing has been read. Raises ImageError.
    """
    if list(sources) != [STREAM] or arguments.format != "raw" or _needs_whole_disk(arguments):
        return False
    if standard_input.is_whole_file():
        return False
    from tapfs.jobs.raw_stream import can_be_streamed, copy_stream, image_of_stream

    if arguments.target == STREAM:
        if arguments.target_format != "raw" or options.rate is not None:
            return False
        copy_stream(standard_input.fill, standard_output())
        return True
    new = plain_new_image_of(arguments, format_name=arguments.target_format, size=None, program=program)
    if not can_be_streamed(arguments.target, new):
        return False
    image_of_stream(standard_input.fill, arguments.target, new, options)
    return True


def _needs_whole_disk(arguments: argparse.Namespace) -> bool:
    """Whether the copy reads the source in another order, or again, packs it, or reads a disk that lies in it."""
    return bool(
        arguments.no_create
        or arguments.compress
        or arguments.target_backing
        or arguments.bitmaps
        or arguments.verify
        or arguments.salvage
        or arguments.disk is not None
        or arguments.snapshot is not None
        or arguments.backing is not None
        or wants_encryption(arguments, arguments.target_format)
    )
