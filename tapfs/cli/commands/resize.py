"""`tapfs resize`: change the size of an image, or of a disk in use."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from tapfs.cli.guests.device import add_disk_options, ask_disk, names_device
from tapfs.cli.options import add_write_base_option, unlocked
from tapfs.cli.parser import UsageError, format_argument, size_argument
from tapfs.cli.reporting import print_line
from tapfs.cli.sizes import human_size

if TYPE_CHECKING:
    from tapfs.cli.parser import Subparsers

_PROGRAM = "tapfs resize"
_DESCRIPTION = """\
Change the size of the image FILE to SIZE: 10G, or by so much with +1G and -1G. What is added reads
as zeros, also where the parent of an overlay is longer. The partitions and file systems inside stay
as they are; with --shrink those behind the new end are lost. 'tapfs formats' says which formats can
be resized; of another one make an overlay of the new size ('tapfs create -b FILE NEW SIZE').

With --domain and --vdev instead of FILE it is the disk of a running Xen guest: the guest is told.
Without SIZE the guest then learns the size that the image has now. With --ublk it is a block device
of this host, if its kernel can tell users of another size (Linux 6.16). With --served it is a disk of
'tapfs serve': a virtual machine is told, an NBD client learns the size when it connects again."""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "resize", help="change the size of an image or of a disk in use", description=_DESCRIPTION
    )
    parser.usage = (
        "tapfs resize [options] FILE SIZE\n       tapfs resize [options] --domain D --vdev V [SIZE]\n"
        "       tapfs resize [options] --ublk DEV [SIZE]\n       tapfs resize [options] --served ADDRESS [SIZE]"
    )
    parser.add_argument("first", metavar="FILE", nargs="?", help="the image")
    parser.add_argument("second", metavar="SIZE", nargs="?", help="the new size: bytes, 10G and the like, +1G or -1G")
    parser.add_argument(
        "-f", "--format", metavar="FMT", type=format_argument, help="format of FILE (raw must be named)"
    )
    parser.add_argument(
        "--shrink",
        "--force",
        dest="force",
        action="store_true",
        help="even if it gets smaller: what lies behind the end is lost",
    )
    parser.add_argument(
        "--preallocation",
        choices=["off", "metadata", "falloc", "full"],
        default="off",
        help="space for what is added: metadata gives each cluster its place (qcow2), falloc has the host reserve its"
        " space (qcow2, raw, luks), full writes zeros (every format; default: off)",
    )
    parser.add_argument("--backing", metavar="PARENT", help="the parent of FILE, if it is not where FILE says")
    parser.add_argument(
        "--backing-format",
        metavar="FMT",
        type=format_argument,
        action="append",
        default=[],
        help="format of the parent",
    )
    parser.add_argument(
        "--key-file",
        metavar="[IMAGE=]FILE",
        action="append",
        help="the first line of FILE is the password of an encrypted image, or of IMAGE in its chain",
    )
    add_write_base_option(parser.add_argument)
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    add_disk_options(parser)
    parser.add_argument("--vhost-user", metavar="PATH", help="the same as --served PATH")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Resize it, and say what size it has."""
    if arguments.vhost_user is not None:
        if arguments.served is not None:
            raise UsageError("--vhost-user and --served name the same disk", _PROGRAM)
        arguments.served = arguments.vhost_user
    size = _of_disk_in_use(arguments) if names_device(arguments, _PROGRAM) else _of_image(arguments)
    if not arguments.quiet:
        print_line(f"{size} bytes ({human_size(size)})")
    return 0


def _of_disk_in_use(arguments: argparse.Namespace) -> int:
    if arguments.second is not None:
        raise UsageError("say either FILE or a disk in use, not both", _PROGRAM)
    if arguments.format is not None:
        raise UsageError("-f is for an image; a disk in use is open already", _PROGRAM)
    if arguments.preallocation != "off":
        raise UsageError("--preallocation is for an image that nobody uses", _PROGRAM)
    size = None if arguments.first is None else _size(arguments.first)
    ask_disk(arguments, "resize", size=size, force=arguments.force)
    found: int = ask_disk(arguments, "status")["size"]
    return found


def _of_image(arguments: argparse.Namespace) -> int:
    if arguments.first is None or arguments.second is None:
        raise UsageError(
            "FILE and SIZE are needed (or --domain and --vdev, --ublk or --served of a disk in use)", _PROGRAM
        )
    from tapfs.disk.chain import OpenOptions
    from tapfs.jobs.resize import resize_image

    text: str = arguments.second
    sign = {"+": 1, "-": -1}.get(text[:1], 0)
    size = _size(text[1:] if sign else text)
    options = OpenOptions(
        format=arguments.format,
        backing=arguments.backing,
        backing_formats=tuple(arguments.backing_format),
        write_base=arguments.write_base,
    )
    return unlocked(
        arguments.key_file,
        arguments.first,
        lambda password: resize_image(
            arguments.first,
            lambda now: now + sign * size if sign else size,
            options,
            shrink=arguments.force,
            preallocation=arguments.preallocation,
            password=password,
        ),
    )


def _size(text: str) -> int:
    try:
        return size_argument(text)
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"argument SIZE: {error}", _PROGRAM) from None
