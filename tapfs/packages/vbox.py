"""VirtualBox's .vbox: the disks that are attached to a virtual machine, each the newest of its differencing images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tapfs.packages.contents import Package, PackagedDisk, damaged, numbered
from tapfs.xml_tree import Element, parsed

#: The formats that a .vbox names.
_FORMATS = {"vdi": "vdi", "vmdk": "vmdk", "vhd": "vhd", "vhdx": "vhdx", "qcow": "qcow", "qcow2": "qcow2", "qed": "qed"}


def read_vbox(content: bytes) -> Package:
    """The package that a .vbox is. Raises ImageError."""
    root = parsed(content, damaged)
    machine = root.first("Machine") if root.name == "VirtualBox" else None
    if machine is None:
        raise damaged("is no description of a VirtualBox machine")
    registered = {
        _uuid(chain[-1]): chain for each in machine.all("MediaRegistry", "HardDisks") for chain in _chains(each, ())
    }
    disks: list[PackagedDisk] = []
    notes: list[str] = []
    for attached in _attached(machine):
        uuid = _uuid(attached)
        if uuid not in registered:
            notes.append(f"a disk is attached that it does not register: {uuid}")
            continue
        chain = registered[uuid]
        locations = [each.attributes.get("location", "") for each in chain]
        if not locations[-1]:
            raise damaged(f"has a disk without a file: {uuid}")
        disks.append(
            PackagedDisk(
                len(disks) + 1,
                locations[-1],
                format=_FORMATS.get(chain[-1].attributes.get("format", "").lower()),
                files=(locations[-1],),
                # The package's own folder, too: what is moved has other folders than its description.
                folders=tuple(dict.fromkeys([*(location.rpartition("/")[0] for location in locations[:-1]), ""])),
            )
        )
    return Package("vbox", numbered(disks), notes=tuple(notes))


def _chains(parent: Element, above: Sequence[Element]) -> Iterator[tuple[Element, ...]]:
    """Each registered disk with the disks that it differs from before it, the base first."""
    for disk in parent.all("HardDisk"):
        chain = (*above, disk)
        yield chain
        yield from _chains(disk, chain)


def _attached(machine: Element) -> Iterator[Element]:
    """The images of the machine's own devices; those of its snapshots are in elements of their own."""
    for path in (("StorageControllers",), ("Hardware", "StorageControllers")):
        for device in machine.all(*path, "StorageController", "AttachedDevice"):
            if device.attributes.get("type") == "HardDisk":
                yield from device.all("Image")


def _uuid(element: Element) -> str:
    return element.attributes.get("uuid", "").lower()
