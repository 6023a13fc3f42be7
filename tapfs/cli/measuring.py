"""The disks in use as `tapfs stats` shows them: what each door has counted, asked of the processes that serve."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tapfs.cli.guard import complain
from tapfs.cli.guests.device import find_named_device, names_device, with_xenstore
from tapfs.errors import ErrorKind, ImageError
from tapfs.records import dataclass

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

    from tapfs.serving.served_disks import ServedDisk
    from tapfs.ublk.attaching import AttachedDevice
    from tapfs.xen.host import Host
    from tapfs.xen.toolstack.attached_disks import AttachedDisk
    from tapfs.xen.xenstore.client import XenStore


@dataclass(frozen=True, slots=True)
class Measured:
    """A disk in use.

    `door`: "fuse", "nbd", "vhost-user", "ublk" or "xen". `place` is where it is as a table shows it, `disk` one name
    for it. `data` has the keys of its JSON. `statistics` counts by name, `operations` by kind of request, with
    histograms (`tapfs.kernel.metrics.as_data`); both are None if its process does not answer or does not count.
    """

    door: str
    place: tuple[str, str]
    disk: str
    image: str
    format: str
    data: dict[str, Any]
    up: bool
    paused: bool = False
    clients: int | None = None
    size: int | None = None
    statistics: Mapping[str, Any] | None = None
    operations: Mapping[str, Any] | None = None

    def counted(self, name: str) -> int | None:
        """A counter by its name among those of guests' disks; None: not counted."""
        kind, _, what = _AMONG_OPERATIONS.get(name, "").partition(" ")
        if kind and self.operations:
            metric = self.operations["operations"]
            found: int = sum(each[what] for each in metric.values()) if kind == "all" else metric[kind][what]
            return found
        value: int | None = (self.statistics or {}).get(name)
        return value


#: The kind of request and the number of it that a counter of a table is.
_AMONG_OPERATIONS = {
    "reads": "read requests",
    "writes": "write requests",
    "flushes": "flush requests",
    "discards": "discard requests",
    "read_bytes": "read bytes",
    "written_bytes": "write bytes",
    "errors": "all errors",
}


def measured(arguments: argparse.Namespace) -> list[Measured]:
    """The disk that the options of a command name, else all of this user: guests', block devices, served, mounts."""
    if arguments.ublk is not None:
        return _block_devices(arguments.ublk)
    if arguments.served is not None:
        return _served(arguments.served)
    if names_device(arguments, "tapfs stats"):
        return _of_guests(arguments)
    return [*_of_guests(arguments), *_block_devices(None), *_served(None), *_mounts()]


def _of_guests(arguments: argparse.Namespace) -> list[Measured]:
    """The disks of guests that are asked for; without Xen there are none."""
    from tapfs.xen.host import find_host

    if arguments.domain is None:
        try:
            find_host()
        except ImageError:
            return []

    async def work(store: XenStore, _host: Host) -> list[Measured]:
        from tapfs.xen.device import our_devices
        from tapfs.xen.toolstack.attached_disks import attached_disks
        from tapfs.xen.toolstack.control_client import ask

        chosen = await find_named_device(store, arguments) if arguments.domain else None
        devices = {(device.domain, device.name): device for device in await our_devices(store)}
        found: list[Measured] = []
        for disk in await attached_disks(store, chosen):
            operations = None
            if disk.statistics is not None and (disk.domain, disk.vdev) in devices:
                with suppress(ImageError):
                    operations = await ask(devices[disk.domain, disk.vdev], "metrics")
            found.append(_of_guest(disk, operations))
        return found

    try:
        return with_xenstore(work)
    except ImageError as error:
        if arguments.domain is not None:
            raise
        # What else there is to measure is measured all the same.
        if error.kind is not ErrorKind.DENIED:
            complain("tapfs", f"the disks of guests are missing: {error}")
        return []


def _of_guest(disk: AttachedDisk, operations: dict[str, Any] | None) -> Measured:
    _, format_name, path = (*disk.spec.split(":", 2), "", "")[:3]
    return Measured(
        "xen",
        disk.place,
        f"{disk.domain}/{disk.vdev}",
        path or disk.spec,
        format_name,
        asdict(disk),
        up=disk.statistics is not None,
        paused=disk.paused,
        statistics=disk.statistics,
        operations=operations,
    )


def _block_devices(named: str | None) -> list[Measured]:
    from tapfs.ublk.record import records

    if named is None and not records():
        return []
    from tapfs.ublk.attaching import ask, attached_devices, device_number, look_at

    def measure(device: AttachedDevice) -> Measured:
        operations = None
        if device.statistics is not None:
            with suppress(ImageError):
                operations = ask(device_number(device.device), "metrics", seconds=_ANSWER_SECONDS)
        return Measured(
            "ublk",
            device.place,
            device.device,
            device.path,
            device.format or "",
            asdict(device),
            up=device.statistics is not None,
            paused=device.summary == "paused",
            size=device.size,
            statistics=device.statistics,
            operations=operations,
        )

    return list(map(measure, attached_devices() if named is None else [look_at(device_number(named))]))


def _served(named: str | None) -> list[Measured]:
    from tapfs.serving.served_disks import ask, look_at, served_disks

    def measure(disk: ServedDisk) -> Measured:
        operations = None
        if disk.statistics is not None:
            with suppress(ImageError):
                operations = ask(disk.address, "metrics", seconds=_ANSWER_SECONDS)
        return Measured(
            disk.door,
            disk.place,
            disk.address,
            disk.path,
            disk.format,
            asdict(disk),
            up=disk.statistics is not None,
            paused=disk.summary == "paused",
            clients=disk.clients,
            size=disk.size,
            statistics=disk.statistics,
            operations=operations,
        )

    return list(map(measure, served_disks() if named is None else [look_at(named)]))


def _mounts() -> list[Measured]:
    from tapfs.fuse.control import ask_for_metrics
    from tapfs.fuse.registry import all_mounts

    found: list[Measured] = []
    for registry, entry in all_mounts():
        answer = ask_for_metrics(registry.directory, registry.socket_name(entry.pid)) if entry.alive else {}
        operations = {key: answer[key] for key in ("bounds_ns", "operations")} if "operations" in answer else None
        data = {
            "mountpoint": entry.mountpoint,
            "path": entry.image,
            "format": entry.format,
            "mode": entry.mode,
            "engine": entry.engine,
            "pid": entry.pid,
            "alive": entry.alive,
            "size": answer.get("size"),
            "statistics": answer.get("statistics"),
        }
        found.append(
            Measured(
                "fuse",
                ("-", entry.mountpoint),
                entry.mountpoint,
                entry.image,
                entry.format,
                data,
                up=bool(answer),
                size=answer.get("size"),
                statistics=answer.get("statistics"),
                operations=operations,
            )
        )
    return found


#: Seconds for which a process that may be stopped or stuck is waited for.
_ANSWER_SECONDS = 5.0
