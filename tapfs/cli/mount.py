"""`tapfs mount`: an image as a directory with `disk`, its flat contents, and `info.json`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.cli.options import add_image_options, open_image

if TYPE_CHECKING:
    import argparse

    from tapfs.cli.parser import Subparsers

_DESCRIPTION = """\
Mount IMAGE on the directory DIR: DIR/disk is the flat disk, DIR/info.json what
'tapfs info --json' prints. Returns when the mount is ready; 'tapfs umount DIR' ends it.

The file systems inside are mounted from there, for example:
  mount -o loop,ro DIR/disk /mnt"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser("mount", help="mount an image on a directory", description=_DESCRIPTION)
    parser.add_argument("image", metavar="IMAGE", help="a file, a block device or ram:NAME")
    parser.add_argument("mountpoint", metavar="DIR", help="the directory to mount on")
    parser.add_argument("--rw", action="store_true", help="let the disk be written (else it is read-only)")
    parser.add_argument("--foreground", action="store_true", help="stay until the mount ends; Ctrl-C unmounts")
    add_image_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Mount, and return when the mount answers (with --foreground: when it has ended)."""
    from tapfs.fuse import mounting
    from tapfs.fuse.registry import Registry

    mounting.require_fuse()
    mountpoint = mounting.check_mount_point(arguments.mountpoint)
    registry = Registry()
    image = open_image(arguments, writable=arguments.rw)
    if arguments.foreground:
        mounting.serve_in_foreground(image, mountpoint, registry)
    else:
        mounting.serve_in_background(image, mountpoint, registry)
    return 0
