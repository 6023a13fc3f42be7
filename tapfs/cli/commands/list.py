"""`tapfs list`: what this user has mounted and serves, the disks of Xen guests, and the RAM disks of the host."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from tapfs.cli.json_output import print_json
from tapfs.cli.reporting import Record, add_json_option, print_records
from tapfs.cli.sizes import human_size

if TYPE_CHECKING:
    import argparse

    from tapfs.cli.parser import Subparsers
    from tapfs.fuse.registry import MountEntry, Registry
    from tapfs.host.ram import RamDisk
    from tapfs.serving.served_disks import ServedDisk
    from tapfs.ublk.attaching import AttachedDevice
    from tapfs.xen.toolstack.attached_disks import AttachedDisk

_DESCRIPTION = """\
List your mounts with what was read and written through them (not counted where the kernel serves
the disk by itself), the disks of 'tapfs serve' and the block devices of 'tapfs attach --ublk', on a
Xen host the disks of its guests, and the RAM disks of this host with what they take. A mount whose
process died is marked (dead); 'tapfs umount' cleans it up. For scripts: --json, with sizes in bytes."""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "list", help="list mounted images, served and attached disks, and RAM disks", description=_DESCRIPTION
    )
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print what there is; with --json an object of `mounts`, `ram_disks`, and, if any, of the others."""
    from tapfs.fuse.registry import all_mounts
    from tapfs.host.ram import ram_disks

    mounts = [(entry, _counted(registry, entry)) for registry, entry in all_mounts()]
    attached = _attached()
    devices = _block_devices()
    served = _served()
    disks = ram_disks()
    if arguments.json:
        data: dict[str, object] = {"mounts": [_as_data(entry, counted) for entry, counted in mounts]}
        guests = {} if attached is None else {"attached": [asdict(disk) for disk in attached]}
        if devices:
            data["block_devices"] = [asdict(device) for device in devices]
        if served:
            data["served"] = [asdict(disk) for disk in served]
        print_json({**data, **guests, "ram_disks": [disk._asdict() for disk in disks]})
        return 0
    print_records("mounted", [_mount_record(entry, counted) for entry, counted in mounts])
    print_records("served", list(map(_served_record, served)))
    print_records("attached", list(map(_attached_record, attached or [])))
    print_records("block devices", list(map(_block_device_record, devices)))
    print_records("RAM disks", list(map(_ram_record, disks)))
    return 0


def _block_devices() -> list[AttachedDevice]:
    """What `tapfs attach --ublk` has made."""
    from tapfs.ublk.record import records

    if not records():
        return []
    from tapfs.ublk.attaching import attached_devices

    return attached_devices()


def _served() -> list[ServedDisk]:
    """What `tapfs serve` serves."""
    from tapfs.serving.served_disks import served_disks

    return served_disks()


def _served_record(disk: ServedDisk) -> Record:
    counted = disk.statistics or {}
    clients = [] if disk.clients is None else [f"{disk.clients} client{'' if disk.clients == 1 else 's'}"]
    mode = "rw" if disk.mode == "w" else "ro"
    transfers = _transfers(counted.get("bytes_read"), counted.get("bytes_written"))
    how = [disk.summary, *_confined(disk.sandbox)]
    facts = [disk.door, mode, disk.format, *how, *clients, *transfers, f"process {disk.pid}"]
    return Record(disk.address, disk.path, facts)


def _block_device_record(device: AttachedDevice) -> Record:
    counted = device.statistics or {}
    process = [] if device.pid is None else [f"process {device.pid}"]
    transfers = _transfers(counted.get("read_bytes"), counted.get("written_bytes"))
    how = [device.summary, *_confined(device.sandbox)]
    facts = [device.mode, device.format or "format unknown", *how, *transfers, *process]
    return Record(device.device, device.path, facts)


def _attached() -> list[AttachedDisk] | None:
    """The disks of guests; None where there is no Xen, or where it is not for this user to see."""
    from tapfs.cli.guard import complain
    from tapfs.errors import ErrorKind, ImageError
    from tapfs.xen.host import find_host

    try:
        find_host()
    except ImageError:
        return None
    from tapfs.cli.guests.device import with_xenstore
    from tapfs.xen.toolstack.attached_disks import attached_disks

    try:
        return with_xenstore(lambda store, _host: attached_disks(store))
    except ImageError as error:
        # What else there is to list is listed all the same.
        if error.kind is not ErrorKind.DENIED:
            complain("tapfs", f"the disks of guests are missing in this list: {error}")
        return None


def _counted(registry: Registry, entry: MountEntry) -> tuple[int | None, int | None]:
    """The bytes read and written through a mount, None where nobody knows."""
    from tapfs.fuse.control import ask_for_status

    said = ask_for_status(registry.directory, registry.socket_name(entry.pid)) if entry.alive else {}
    return said.get("bytes_read"), said.get("bytes_written")


def _mount_record(entry: MountEntry, counted: tuple[int | None, int | None]) -> Record:
    shows = entry.shows if entry.partition is None else f"{entry.shows} of partition {entry.partition}"
    process = f"process {entry.serving}" + ("" if entry.alive else " (dead)")
    proved = [] if entry.sidecar is None else ["reads verified"]
    how = [f"engine {entry.engine}", *proved, *_confined(entry.sandbox)]
    facts = [shows, entry.mode, entry.format, *how, *_transfers(*counted), process]
    return Record(entry.mountpoint, entry.image, facts)


def _confined(sandbox: str | None) -> list[str]:
    """What is to be said of a sandbox that is not whole."""
    return {None: [], "on": [], "off": ["no sandbox"]}.get(sandbox, [f"sandbox {sandbox}"])


def _transfers(read: int | None, written: int | None) -> list[str]:
    if read is None or written is None:
        return ["not counted"]
    return [f"{human_size(read)} read", f"{human_size(written)} written"]


def _as_data(entry: MountEntry, counted: tuple[int | None, int | None]) -> dict[str, object]:
    data: dict[str, object] = asdict(entry)
    for internal in ("process_start", "device", "server", "server_start"):
        del data[internal]
    data["pid"] = entry.serving
    data["keeper"] = None if entry.server is None else entry.pid
    data.update(alive=entry.alive, bytes_read=counted[0], bytes_written=counted[1])
    return data


def _attached_record(disk: AttachedDisk) -> Record:
    domain = str(disk.domain) if disk.domain_name is None else f"{disk.domain} ({disk.domain_name})"
    counted = disk.statistics or {}
    process = [] if disk.pid is None else [f"process {disk.pid}"]
    transfers = _transfers(counted.get("read_bytes"), counted.get("written_bytes"))
    how = [disk.summary, *_confined(disk.sandbox)]
    return Record(f"{disk.vdev} of domain {domain}", disk.spec, [disk.mode, *how, *transfers, *process])


def _ram_record(disk: RamDisk) -> Record:
    return Record(f"ram:{disk.name}", f"{human_size(disk.size)}, {human_size(disk.allocated)} taken", [])
