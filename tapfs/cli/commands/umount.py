"""`tapfs umount`: flush, unmount, close the image, and say what went wrong."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from tapfs.cli.parser import UsageError

if TYPE_CHECKING:
    import argparse

    from tapfs.cli.parser import Subparsers

_DESCRIPTION = """\
Unmount what 'tapfs mount' mounted on each DIR, or the image that is named instead. Returns when the
images are closed; an error met on the way there is reported and is the exit code. If the flush fails
or somebody uses the mount it stays, unless --force is given. What a killed process left is cleaned up."""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser("umount", help="unmount images", description=_DESCRIPTION)
    parser.add_argument("mountpoints", metavar="DIR", nargs="*", help="where an image is mounted, or the image")
    parser.add_argument("-a", "--all", action="store_true", help="all that 'tapfs list' lists, the newest first")
    parser.add_argument("--force", action="store_true", help="unmount even if the flush fails or DIR is in use")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Unmount each and wait for the end of the process that served it; an error is of the first that failed."""
    from tapfs.cli.guard import complain
    from tapfs.cli.waiting import told_of_waiting
    from tapfs.errors import ImageError
    from tapfs.fuse.registry import all_mounts
    from tapfs.fuse.silence import what_is_waited_for
    from tapfs.fuse.unmounting import unmount_image

    mountpoints: list[str] = arguments.mountpoints
    if arguments.all == bool(mountpoints):
        raise UsageError("say either what to unmount, DIR ..., or --all", "tapfs umount")
    if "" in mountpoints:
        raise UsageError("DIR is empty", "tapfs umount")
    if arguments.all:
        mountpoints = [entry.mountpoint for _, entry in reversed(all_mounts())]
    code = 0
    for mountpoint in mountpoints:
        try:
            with told_of_waiting(partial(what_is_waited_for, mountpoint)):
                note = unmount_image(mountpoint, force=arguments.force)
        except ImageError as error:
            note = f"error: {error}"
            code = code or error.exit_code
        if note is not None:
            complain("tapfs", note)
    return code
