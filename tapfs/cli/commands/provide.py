"""`tapfs provide`: the images of a folder as storage volumes of systemd."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from tapfs.cli.parser import Subparsers

_DESCRIPTION = """\
Offer the images in FOLDER as storage volumes to systemd (io.systemd.StorageProvider, systemd 261):
to 'storagectl', 'mount -t storage', 'systemd-vmspawn --bind-volume' and others that speak Varlink.
A volume is the flat disk of an image, as a regular file, read-only or writable. Whoever has been
given it keeps it, also after this command has ended; when the last one closes it the image is closed.
Files called .raw or .img are raw disks whatever they hold. A volume that is missing can be made: the
client says its size, and the template or the ending of its name says the format. For example:
  tapfs provide /srv/images --socket /run/systemd/io.systemd.StorageProvider/tapfs
  storagectl volumes
Without --socket the socket is that of systemd (LISTEN_FDS): tapfs-volumes.socket."""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "provide", help="offer images as storage volumes of systemd", description=_DESCRIPTION
    )
    parser.add_argument("folder", metavar="FOLDER", help="where the images lie; not in folders below it")
    parser.add_argument("--socket", metavar="PATH", help="the Unix socket, for this user alone")
    parser.add_argument(
        "--backing-root", metavar="DIR", help="where parents of images may lie; in FOLDER if this is not given"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal ends it."""
    import os

    from tapfs.errors import ErrorKind, ImageError
    from tapfs.serving.listening import inherited_listeners, listen_locally
    from tapfs.volumes.images import Volumes
    from tapfs.volumes.provider import StorageProvider
    from tapfs.volumes.server import serve

    if not os.path.isdir(arguments.folder):
        raise ImageError(ErrorKind.NOT_FOUND, "no such folder", path=arguments.folder, op="list volumes")
    listeners = [listen_locally(arguments.socket)] if arguments.socket else inherited_listeners()
    if not listeners:
        raise ImageError(
            ErrorKind.INVALID_ARGUMENT,
            "there is no socket",
            op="listen",
            remedy="say --socket PATH, or start a socket unit",
        )
    serve(listeners, StorageProvider(Volumes(arguments.folder, arguments.backing_root)), path=arguments.socket)
    return 0
