"""`tapfs attach`: an image as a disk of a Xen guest, as a block device of domain 0, or as one of any Linux."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapfs.cli.guests.device import with_xenstore
from tapfs.cli.options import add_write_base_option
from tapfs.cli.parser import UsageError, format_argument, size_argument
from tapfs.cli.reporting import print_line
from tapfs.disk.password import absolute_key_file

if TYPE_CHECKING:
    import argparse

    from tapfs.cli.parser import Subparsers
    from tapfs.xen.host import Host
    from tapfs.xen.specification import DiskSpecification
    from tapfs.xen.xenstore.client import XenStore

_DESCRIPTION = """\
Attach an image as a block device of this host, by ublk of Linux 6.4 and later. Prints its name when it
can be used; 'tapfs detach --ublk DEV' takes it away. If the process that serves it is killed, another
one goes on, and the device's users see a pause:
  tapfs attach --ublk disk.qcow2 && mount /dev/ublkb0 /mnt

Or attach an image to a running Xen guest as its disk DEV, served by a process of its own. Returns
when the guest can use it. For domain 0 itself it waits for the block device and prints its name:
  tapfs attach disk.qcow --domain 0 --vdev xvdh && mount /dev/xvdh /mnt

SPEC is tap:qcow:FILE, tap:aio:FILE (raw, past the page cache), tap:ram:NAME, tap:FORMAT:FILE or
just FILE; ',DEV,MODE' may follow as in a guest's configuration. xl's strings are understood, too:
file:FILE, phy:DEVICE, 'vdev=xvda,access=ro,target=FILE'. 'tapfs blktapctrl' must run."""

_PROGRAM = "tapfs attach"


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "attach", help="attach an image as a block device, or to a Xen guest", description=_DESCRIPTION
    )
    parser.add_argument("spec", metavar="SPEC", help="what to attach")
    parser.add_argument("--ublk", action="store_true", help="as a block device /dev/ublkbN of this host")
    parser.add_argument("--queues", metavar="N", type=int, help="with --ublk: its queues (one a processor, up to 4)")
    parser.add_argument("--domain", metavar="D", help="the guest, by number or name")
    parser.add_argument("--vdev", metavar="V", help="the disk it becomes there: xvda, sda, hda, ... or a number")
    parser.add_argument(
        "--backend-domain",
        metavar="B",
        help="the driver domain that serves it, by number or name (domain 0): there lies the image, and 'tapfs "
        "blktapctrl' runs",
    )
    parser.add_argument(
        "--mode",
        metavar="MODE",
        choices=("r", "w", "w!"),
        help="r: read-only; w: nobody else may use the image (the default); w!: shared with others who write it",
    )
    parser.add_argument(
        "-f",
        "--format",
        metavar="FMT",
        type=format_argument,
        help="format of the image (raw must be named to be writable)",
    )
    parser.add_argument(
        "--backing-format",
        metavar="FMT",
        type=format_argument,
        action="append",
        default=[],
        help="format of the parent; given again, that of the parent's parent, and so on",
    )
    add_write_base_option(parser.add_argument)
    parser.add_argument(
        "--key-file",
        metavar="[IMAGE=]FILE",
        action="append",
        default=[],
        help="the first line of FILE is the password of an encrypted image; IMAGE=FILE gives one image of the chain its"
        " own; may be given again",
    )
    parser.add_argument("--direct", action="store_true", help="bypass the page cache of the host (O_DIRECT)")
    parser.add_argument(
        "--grants",
        choices=("copy", "map", "persistent"),
        help="how data comes from the guest's memory: copied (the default), by pages mapped for each request, or by "
        "pages that stay mapped where the guest keeps them for its disk",
    )
    parser.add_argument(
        "--wait-on",
        choices=("space", "errors", "nothing"),
        help="have the guest wait, until 'tapfs resume' or a later try succeeds, instead of telling it of an error: "
        "where the host is full (the default), also where its disk fails, or never",
    )
    parser.add_argument("--no-wait", action="store_true", help="return at once; 'tapfs list' shows how it went")
    group = parser.add_argument_group("what its process may take")
    group.add_argument(
        "--cache",
        metavar="SIZE",
        type=size_argument,
        help="the most memory for the maps of the image (32M), and half as much for unpacked clusters",
    )
    group.add_argument("--nice", metavar="N", type=int, help="its niceness, -20 to 19")
    group.add_argument("--memory", metavar="BYTES", type=size_argument, help="the most memory it may use")
    group.add_argument("--open-files", metavar="N", type=int, help="the most files it may have open")
    group.add_argument(
        "--limit-bytes", metavar="N", type=size_argument, help="bytes that the guest may move a second (0: no limit)"
    )
    group.add_argument(
        "--limit-requests", metavar="N", type=int, help="requests that it may make a second (0: no limit)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Attach it."""
    _check(arguments)
    if arguments.ublk:
        return _block_device(arguments)
    from tapfs.xen.host import find_host

    find_host()  # without Xen nothing else of the command line matters
    from tapfs.xen.toolstack.xl_syntax import parse_disk

    specification = parse_disk(arguments.spec).absolute()
    number = _number(arguments, specification)
    if arguments.format is not None and specification.format not in (None, arguments.format):
        raise UsageError(f"the disk says {specification.format}, -f says {arguments.format}", _PROGRAM)

    async def work(store: XenStore, host: Host) -> str | None:
        from tapfs.xen.device import OUR_KIND, Device, find_domain
        from tapfs.xen.toolstack.attach import attach, attach_and_wait
        from tapfs.xen.toolstack.block_device import wait_for_block_device

        domain = await find_domain(store, arguments.domain)
        backend_domain = await find_domain(store, arguments.backend_domain or "0")
        device = Device(OUR_KIND, domain, number, backend_domain)
        attach_disk = attach if arguments.no_wait else attach_and_wait
        await attach_disk(
            store,
            device,
            params=specification.params,
            mode=arguments.mode or specification.mode or "w",
            options=_options(arguments),
        )
        if device.domain != 0 or arguments.no_wait:
            return None
        return await wait_for_block_device(store, device, simulated=host.machine is not None)

    block_device = with_xenstore(work)
    if block_device is not None:
        print_line(block_device)
    return 0


def _block_device(arguments: argparse.Namespace) -> int:
    """Attach a block device of this host, and print its name."""
    for name in ("domain", "vdev", "backend_domain", "grants", "nice", "memory", "open_files", "no_wait"):
        if getattr(arguments, name) not in (None, False):
            raise UsageError(f"--{name.replace('_', '-')} is for the disk of a Xen guest", _PROGRAM)
    from tapfs.ublk.driver import require_ublk

    require_ublk()
    from tapfs.ublk.attaching import attach
    from tapfs.ublk.record import DiskRecord

    disk = DiskRecord(
        number=-1,
        path=arguments.spec,
        token="",
        format=arguments.format,
        mode=arguments.mode or "w",
        backing_formats=tuple(arguments.backing_format),
        write_base=arguments.write_base,
        key_files=tuple(map(absolute_key_file, arguments.key_file)),
        direct=arguments.direct,
        cache_bytes=arguments.cache,
        wait_on=arguments.wait_on or "space",
        limit_bytes=arguments.limit_bytes or 0,
        limit_requests=arguments.limit_requests or 0,
    )
    print_line(attach(disk, queues=arguments.queues))
    return 0


def _number(arguments: argparse.Namespace, specification: DiskSpecification) -> int:
    from tapfs.xen.device import parse_vdev

    if arguments.vdev is not None:
        return parse_vdev(arguments.vdev)
    if specification.vdev is None:
        raise UsageError("--vdev is missing, and the disk does not end in ',DEV,MODE'", _PROGRAM)
    return specification.vdev


def _check(arguments: argparse.Namespace) -> None:
    """See that the numbers are possible ones, and that it is said what the disk is for."""
    if not arguments.ublk and arguments.domain is None:
        raise UsageError("say --ublk for a block device of this host, or --domain and --vdev for a Xen guest", _PROGRAM)
    if not arguments.ublk and arguments.queues is not None:
        raise UsageError("--queues goes with --ublk", _PROGRAM)
    ranges = {"queues": (1, 64), "nice": (-20, 19), "open_files": (64, 1 << 20), "limit_requests": (0, 1 << 32)}
    for name, (least, most) in ranges.items():
        value = getattr(arguments, name)
        if value is not None and not least <= value <= most:
            raise UsageError(f"--{name.replace('_', '-')} {value}: must be {least} to {most}", _PROGRAM)


def _options(arguments: argparse.Namespace) -> dict[str, str | int]:
    """What goes to the keys of ours in xenstore."""
    names = {
        "format": "format",
        "grants": "grants",
        "wait_on": "wait-on",
        "cache": "cache",
        "nice": "nice",
        "memory": "memory",
        "open_files": "open-files",
        "limit_bytes": "limit-bytes",
        "limit_requests": "limit-requests",
    }
    given = {key: getattr(arguments, name) for name, key in names.items()}
    options: dict[str, str | int] = {key: value for key, value in given.items() if value is not None}
    if arguments.direct:
        options["direct"] = 1
    if arguments.write_base:
        options["write-base"] = 1
    if arguments.backing_format:
        options["backing-formats"] = ",".join(arguments.backing_format)
    if arguments.key_file:
        # The process that reads them works in another folder, and no password comes into xenstore.
        options["key-file"] = "\n".join(map(absolute_key_file, arguments.key_file))
    return options
