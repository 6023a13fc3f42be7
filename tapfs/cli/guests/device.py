"""Naming a guest's disk, and talking to xenstore about it: shared by the commands of this folder."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any, TypeVar

from tapfs.cli.parser import UsageError
from tapfs.errors import ErrorKind, ImageError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Awaitable, Callable

    from tapfs.xen.device import Device
    from tapfs.xen.host import Host
    from tapfs.xen.xenstore.client import Store, XenStore

_Result = TypeVar("_Result")


def add_device_options(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add --domain and --vdev."""
    parser.add_argument("--domain", metavar="D", required=required, help="the guest, by number or name")
    parser.add_argument(
        "--vdev", metavar="V", required=required, help="its disk: xvda, sda, hda, ... or a number such as 51712"
    )


def add_copied_disk_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a disk that jobs may copy: --domain and --vdev, or --ublk."""
    add_device_options(parser, required=False)
    parser.add_argument("--ublk", metavar="DEV", help="a block device of 'tapfs attach --ublk' instead: /dev/ublkbN")


def add_disk_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a disk in use: --domain and --vdev, --ublk, or --served."""
    add_copied_disk_options(parser)
    parser.add_argument(
        "--served",
        metavar="ADDRESS",
        help="a disk of 'tapfs serve' instead: the address that it printed, its socket, or its image",
    )


def names_device(arguments: argparse.Namespace, program: str) -> bool:
    """Whether the options name one disk; none at all do not. Raises UsageError where they name half of one, or two."""
    if (arguments.domain is None) != (arguments.vdev is None):
        raise UsageError("--domain and --vdev name a disk together", program)
    served = getattr(arguments, "served", None)
    if len([each for each in (arguments.ublk, served, arguments.domain) if each is not None]) > 1:
        raise UsageError(f"say either {_choice(arguments)}", program)
    return any(each is not None for each in (arguments.ublk, served, arguments.domain))


def require_device(arguments: argparse.Namespace, program: str) -> None:
    """Raise UsageError unless the options name one disk."""
    if not names_device(arguments, program):
        raise UsageError(f"say which disk: {_choice(arguments)}", program)


def _choice(arguments: argparse.Namespace) -> str:
    """The options that name a disk for this command."""
    return (
        "--domain and --vdev, --ublk or --served" if hasattr(arguments, "served") else "--domain and --vdev, or --ublk"
    )


def with_xenstore(work: Callable[[XenStore, Host], Awaitable[_Result]]) -> _Result:
    """Do `work` with this host's xenstore and return its result. A signal cancels it first, so that it cleans up.

    Raises ImageError, where there is no Xen one of kind unsupported before anything heavy is loaded.
    """
    from tapfs.xen.host import find_host

    host = find_host()
    import trio

    from tapfs.cli.signals import Terminated
    from tapfs.serving.nursery_errors import error_of
    from tapfs.xen.xenstore.client import connect

    caught = [number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if _is_heeded(number)]
    came: list[int] = []
    results: list[_Result] = []

    async def cancel_on_signal(
        scope: trio.CancelScope, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        with trio.open_signal_receiver(*caught) as signals:
            task_status.started()
            async for number in signals:
                came.append(number)
                scope.cancel()

    async def main() -> None:
        # The connection outlives the cancelled work, which has to clean up by it.
        async with connect(host) as store, trio.open_nursery() as nursery:
            await nursery.start(cancel_on_signal, nursery.cancel_scope)
            results.append(await work(store, host))
            nursery.cancel_scope.cancel()

    try:
        trio.run(main)
    except BaseExceptionGroup as group:
        raise error_of(group) from group
    if came and not results:
        raise KeyboardInterrupt if came[0] == signal.SIGINT else Terminated(came[0])
    return results[0]


async def find_named_device(store: Store, arguments: argparse.Namespace, *, anywhere: bool = False) -> Device:
    """The disk of ours that --domain and --vdev name; `anywhere`: also one that a driver domain serves.

    Raises ImageError(not_found, invalid_argument), and ImageError(unsupported) for a disk of another domain.
    """
    from tapfs.xen.device import find_domain, our_device_elsewhere, our_devices, parse_vdev, vdev_name

    number = parse_vdev(arguments.vdev)
    domain = await find_domain(store, arguments.domain)
    for device in await our_devices(store):
        if (device.domain, device.number) == (domain, number):
            return device
    other = await our_device_elsewhere(store, domain, number)
    if other is not None and anywhere:
        return other
    if other is not None:
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            f"{other} is served by domain {other.backend_domain}",
            remedy="run the command there",
        )
    raise ImageError(
        ErrorKind.NOT_FOUND,
        f"domain {domain} has no disk {vdev_name(number)} that tapfs serves",
        remedy="'tapfs list' shows them all",
    )


def ask_disk(arguments: argparse.Namespace, command: str, **details: object) -> dict[str, Any]:
    """Have the process of the named disk do a command (tapfs/xen/disk/control.py); its answer. Raises ImageError."""
    if arguments.ublk is not None:
        from tapfs.ublk import attaching

        return attaching.ask(attaching.device_number(arguments.ublk), command, details)
    if arguments.served is not None:
        from tapfs.serving import served_disks

        return served_disks.ask(arguments.served, command, **details)

    async def work(store: XenStore, _host: Host) -> dict[str, Any]:
        from tapfs.xen.toolstack.control_client import ask

        return await ask(await find_named_device(store, arguments), command, **details)

    return with_xenstore(work)


def _is_heeded(number: int) -> bool:
    return signal.getsignal(number) is not signal.SIG_IGN
