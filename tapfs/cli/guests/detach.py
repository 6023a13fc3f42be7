"""`tapfs detach`: take a disk from a Xen guest, a block device from this host, or end a server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.cli.guests.device import add_disk_options, find_named_device, require_device, with_xenstore

if TYPE_CHECKING:
    import argparse

    from tapfs.cli.parser import Subparsers
    from tapfs.xen.host import Host
    from tapfs.xen.xenstore.client import XenStore

_DESCRIPTION = """\
Detach a disk from a Xen guest: the guest is asked to let go of it; when this returns all that it has
written is in the image, and the image is closed. A guest that uses the disk (has it mounted) keeps
it, and is told to let go as soon as it can; --force takes it away all the same. Disks that xl
attached are detached with 'xl block-detach'.

With --ublk it is a block device of this host, which nothing may have mounted, and whose users may not
wait for the host (--wait-on): with --force its users get errors instead. With --served it is a server of
'tapfs serve', with all of its images: it ends unless clients are connected; with --force their
connections end, once they have the answers that they wait for."""

#: Seconds that a guest has to let go.
_PATIENCE, _FORCED_PATIENCE = 20.0, 2.0


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "detach", help="detach a disk from a Xen guest, or a block device; end a server", description=_DESCRIPTION
    )
    add_disk_options(parser)
    parser.add_argument(
        "--force", action="store_true", help="even if the guest uses it: it loses what it has not written"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Detach it."""
    require_device(arguments, "tapfs detach")
    if arguments.ublk is not None:
        from tapfs.ublk.attaching import detach as detach_block_device
        from tapfs.ublk.attaching import device_number

        detach_block_device(device_number(arguments.ublk), force=arguments.force)
        return 0
    if arguments.served is not None:
        from tapfs.serving.served_disks import stop

        stop(arguments.served, force=arguments.force)
        return 0

    async def work(store: XenStore, _host: Host) -> None:
        from tapfs.xen.toolstack.attach import detach

        device = await find_named_device(store, arguments, anywhere=True)
        seconds = _FORCED_PATIENCE if arguments.force else _PATIENCE
        await detach(store, device, seconds=seconds, force=arguments.force)

    with_xenstore(work)
    return 0
