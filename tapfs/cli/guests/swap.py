"""`tapfs swap`: a live snapshot of a disk in use, after which the disk keeps its name."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from tapfs.cli.guests.device import add_disk_options, ask_disk, with_xenstore
from tapfs.cli.parser import UsageError, size_argument
from tapfs.cli.reporting import print_line

if TYPE_CHECKING:
    import argparse

    from tapfs.cli.parser import Subparsers
    from tapfs.xen.host import Host
    from tapfs.xen.toolstack.swap_all import Swapped
    from tapfs.xen.xenstore.client import XenStore

_PROGRAM = "tapfs swap"
#: A chain of more images is worth a warning.
_LONG_CHAIN = 16

_DESCRIPTION = """\
Take a live snapshot of a guest's disk, a block device or a served disk: it is paused, what it has written is flushed,
and the image gets the name FILE, under which it stays as it was at that moment: copy it, or keep it. From then on
all writes go to an overlay over FILE, which has the name that the image had. So whoever starts the
guest again, restores or moves it opens the newest state. The guest sees a short pause. A disk that
was paused before stays paused.

With --all it is all disks of the guest that are written, at one moment: none of them holds what was written
after something that another of them lacks. Each image gets its own name with FILE behind it (.monday).
If one fails, all go on as before. --freeze runs COMMAND freeze before and COMMAND thaw afterwards, for
example a script that has the guest's file systems at rest.

With --keep-names the image keeps its name, and FILE is the overlay: for block devices and RAM disks,
whose names cannot pass to a file. The toolstack has to name FILE then, before the guest starts again:
until it does, the image below is not opened for writing."""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "swap", help="live snapshot: keep what a disk in use holds under another name", description=_DESCRIPTION
    )
    add_disk_options(parser)
    parser.add_argument("file", metavar="FILE", help="the new name of what the disk holds now")
    parser.add_argument("--all", action="store_true", help="all disks of the guest at one moment; FILE is a suffix")
    parser.add_argument("--freeze", metavar="COMMAND", help="with --all: brings the guest to rest, and ends that")
    parser.add_argument("--size", type=size_argument, help="make the disk this large in the new overlay")
    parser.add_argument(
        "--keep-names", action="store_true", help="let FILE be the overlay that takes the writes from now on"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Do it."""
    if not arguments.file:
        raise UsageError("FILE must be the name of a file", _PROGRAM)
    alone = [word for word in (arguments.ublk, arguments.served) if word is not None]
    if alone and (len(alone), arguments.domain, arguments.vdev, arguments.all) != (1, None, None, False):
        raise UsageError("--ublk or --served names a disk by itself", _PROGRAM)
    if not alone and (arguments.domain is None or (arguments.vdev is None) != arguments.all):
        raise UsageError("say --domain, and either --vdev or --all; --ublk; or --served", _PROGRAM)
    if arguments.all:
        _swap_all(arguments)
        return 0
    if arguments.freeze is not None:
        raise UsageError("--freeze goes with --all", _PROGRAM)
    file = os.path.abspath(arguments.file)
    done = ask_disk(arguments, "swap", file=file, size=arguments.size, keep_names=arguments.keep_names)
    _warn_of_long_chain(done["images"])
    return 0


def _swap_all(arguments: argparse.Namespace) -> None:
    if arguments.size is not None or arguments.keep_names or "/" in arguments.file:
        raise UsageError("with --all FILE is what is put behind each name, without --size and --keep-names", _PROGRAM)

    async def work(store: XenStore, _host: Host) -> list[Swapped]:
        from tapfs.xen.device import find_domain
        from tapfs.xen.toolstack.swap_all import swap_all

        domain = await find_domain(store, arguments.domain)
        return await swap_all(store, domain, arguments.file, freeze=arguments.freeze)

    for disk in with_xenstore(work):
        print_line(f"{disk.device.name}: {disk.file}")
        _warn_of_long_chain(disk.images)


def _warn_of_long_chain(images: int) -> None:
    from tapfs.cli.guard import complain

    if images > _LONG_CHAIN:
        complain("tapfs", f"the chain has {images} images, each of which costs memory: tapfs commit makes it shorter")
