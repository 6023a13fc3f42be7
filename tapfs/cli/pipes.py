"""Standard input as an image that is read, and standard output as one that is made."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tapfs.cli.guard import closed_streams
from tapfs.cli.parser import UsageError, size_argument

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from tapfs.jobs.streamed_image import Pipe
    from tapfs.kernel.engine import Buffer

#: The name that means standard input or output.
STREAM = "-"


def add_spool_option(parser: argparse.ArgumentParser) -> None:
    """Add what :func:`standard_input_ready` reads."""
    parser.add_argument(
        "--spool-limit",
        metavar="SIZE",
        type=size_argument,
        help="with - as SOURCE: keep at most SIZE bytes of it in $TMPDIR or /var/tmp (default: all space but 1G)",
    )


def check_piped(arguments: argparse.Namespace, sources: Sequence[str], program: str) -> None:
    """Raise UsageError for options that do not go with standard input or output, or for a terminal as either."""
    if arguments.spool_limit is not None and STREAM not in sources:
        raise UsageError("--spool-limit goes with - as SOURCE", program)
    if sources.count(STREAM) > 1:
        raise UsageError("standard input is one SOURCE at most", program)
    for number, named, role in ((0, STREAM in sources, "SOURCE"), (1, arguments.target == STREAM, "TARGET")):
        if named and number in closed_streams:
            stream = "output" if number else "input"
            raise UsageError(f"- as {role} is standard {stream}, which is closed: send it somewhere", program)
    if STREAM in sources and sys.stdin.isatty():
        raise UsageError("- as SOURCE is standard input, which is a terminal: send an image to it", program)
    if arguments.target != STREAM:
        return
    if sys.stdout.isatty():
        raise UsageError("- as TARGET is standard output, which is a terminal: send it to a file or a program", program)
    if arguments.no_create or arguments.bitmaps:
        raise UsageError("-n and --bitmaps write into a file, not to standard output", program)


class PatientOutput:
    """Standard output where the program that reads it has made it non-blocking: a write waits until there is room.

    The flag is not changed, because it belongs to all who have the pipe.
    """

    def write(self, data: Buffer, /) -> object:
        """Write all of it. Raises OSError, and BrokenPipeError if nobody reads any more."""
        descriptor = sys.stdout.fileno()
        room = select.poll()
        room.register(descriptor, select.POLLOUT)
        with memoryview(data).cast("B") as view:
            done = 0
            while done < len(view):
                try:
                    done += os.write(descriptor, view[done:])
                except BlockingIOError:
                    room.poll()
        return None


def standard_output() -> Pipe:
    """What takes the bytes of an image that is written to standard output."""
    sys.stdout.flush()
    return sys.stdout.buffer if os.get_blocking(sys.stdout.fileno()) else PatientOutput()


@contextmanager
def standard_input_ready(arguments: argparse.Namespace, sources: Sequence[str]) -> Generator[None]:
    """Have standard input ready to be opened, if it is one of the sources."""
    if STREAM not in sources:
        yield
        return
    from tapfs.host import standard_input

    why = "standard input is kept in {}, because an image is read in any order"
    if arguments.format is None:
        why += " (a raw disk is passed on as it comes if -f raw says so)"
    standard_input.take(arguments.spool_limit, told_scratch(why, arguments))
    try:
        yield
    finally:
        standard_input.give_back()


def told_scratch(text: str, arguments: argparse.Namespace) -> Callable[[str], None]:
    """What says on stderr that a scratch file is made in the folder {}, unless the user wants quiet."""

    def tell(folder: str) -> None:
        from tapfs.cli.guard import complain

        if not arguments.quiet:
            complain("tapfs", text.format(folder))

    return tell
