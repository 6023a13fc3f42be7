"""`tapfs umount`: flush, unmount, close the image, and say what went wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from tapfs.cli.parser import Subparsers

_DESCRIPTION = """\
Unmount what 'tapfs mount' mounted on DIR. Returns when the image is closed; an error met on
the way there is reported and is the exit code. If the flush fails or somebody uses the mount
it stays, unless --force is given. What a killed process left is cleaned up."""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser("umount", help="unmount an image", description=_DESCRIPTION)
    parser.add_argument("mountpoint", metavar="DIR", help="where the image is mounted")
    parser.add_argument("--force", action="store_true", help="unmount even if the flush fails or DIR is in use")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Unmount and wait for the end of the process that served the mount."""
    from tapfs.cli.guard import complain
    from tapfs.fuse.unmounting import unmount_image

    note = unmount_image(arguments.mountpoint, force=arguments.force)
    if note is not None:
        complain("tapfs", note)
    return 0
