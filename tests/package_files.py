"""Packages of virtual machines made by hand, from descriptors and Python's tarfile."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import xxhash

CHUNK = 1 << 20

_OVF = """<?xml version="1.0" encoding="UTF-8"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1">
  <References>{files}</References>
  <DiskSection><Info>disks</Info>{disks}</DiskSection>
</Envelope>
"""


def ovf(names: Iterable[str], *, capacity: int = 4, attributes: Mapping[str, str] | None = None) -> bytes:
    """A descriptor with a disk of `capacity` MiB in each file; `attributes` are further ones of each File."""
    listed = list(names)
    more = "".join(f' ovf:{key}="{value}"' for key, value in (attributes or {}).items())
    files = "".join(f'<File ovf:href="{name}" ovf:id="file{i}"{more}/>' for i, name in enumerate(listed))
    disks = "".join(
        f'<Disk ovf:diskId="disk{i}" ovf:fileRef="file{i}" ovf:capacity="{capacity}"'
        ' ovf:capacityAllocationUnits="byte * 2^20"/>'
        for i in range(len(listed))
    )
    return _OVF.format(files=files, disks=disks).encode()


def manifest(files: Mapping[str, bytes], algorithm: str = "sha256") -> bytes:
    """The digests of files."""
    name = algorithm.upper()
    return "".join(
        f"{name}({file})= {hashlib.new(algorithm, content).hexdigest()}\n" for file, content in files.items()
    ).encode()


def archive(path: Path, files: Mapping[str, bytes], *, format: int = tarfile.USTAR_FORMAT, mode: str = "w") -> Path:  # noqa: A002
    """A tar archive of these files, in their order."""
    with tarfile.open(path, mode, format=format) as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            add(tar, name, content)
    return path


def add(tar: tarfile.TarFile, name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
    """Add one member."""
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = len(content), kind, link
    tar.addfile(member, io.BytesIO(content))


def ova(path: Path, disks: Mapping[str, bytes], **options: int) -> Path:
    """An .ova with a manifest: the descriptor first, as the standard has it."""
    descriptor = ovf(disks)
    name = f"{path.stem}.ovf"
    digests = manifest({name: descriptor, **disks})
    return archive(path, {name: descriptor, f"{path.stem}.mf": digests, **disks}, **options)


def ova_xml(disks: Mapping[str, int], *, device: Mapping[str, str] | None = None) -> bytes:
    """XenServer's description of a machine: VDIs of these sizes, attached as the devices 0, 1 and so on."""

    def struct(fields: Mapping[str, str]) -> str:
        members = (f"<member><name>{name}</name><value>{value}</value></member>" for name, value in fields.items())
        return f"<struct>{''.join(members)}</struct>"

    values: list[str] = []
    for number, (reference, size) in enumerate(disks.items()):
        place = (device or {}).get(reference, str(number))
        vbd = struct({"VM": "Ref:1", "VDI": reference, "userdevice": place, "type": "Disk", "bootable": "1"})
        vdi = struct({"name_label": f"disk {number}", "virtual_size": str(size)})
        for kind, identity, snapshot in (("VBD", f"Ref:9{number}", vbd), ("VDI", reference, vdi)):
            values.append(f"<value>{struct({'class': kind, 'id': identity, 'snapshot': snapshot})}</value>")
    objects = f"<array><data>{''.join(values)}</data></array>"
    return f"<?xml version='1.0'?><value>{struct({'version': struct({}), 'objects': objects})}</value>".encode()


def xva_members(reference: str, disk: bytes, *, checksum: str = "xxhash") -> dict[str, bytes]:
    """The members of one disk, as XenServer writes them: zeros are left out but for the first and the last chunk."""
    found: dict[str, bytes] = {}
    count = -(-len(disk) // CHUNK)
    for number in range(count):
        content = disk[number * CHUNK : (number + 1) * CHUNK]
        if any(content) or number in {0, count - 1}:
            found[f"{reference}/{number:08}"] = content
            made = xxhash.xxh64(content) if checksum == "xxhash" else hashlib.sha1(content, usedforsecurity=False)
            found[f"{reference}/{number:08}.{checksum}"] = made.hexdigest().encode()
    return found


def xva(path: Path, disks: Mapping[str, bytes], *, checksum: str = "xxhash") -> Path:
    """An .xva with these disks."""
    members = {"ova.xml": ova_xml({name: len(disk) for name, disk in disks.items()})}
    for name, disk in disks.items():
        members |= xva_members(name, disk, checksum=checksum)
    return archive(path, members)


def vbox(disks: str, attached: Iterable[str]) -> bytes:
    """A .vbox with a registry of disks (XML), and the UUIDs of those that are attached."""
    devices = "".join(
        f'<AttachedDevice type="HardDisk" port="{port}" device="0"><Image uuid="{uuid}"/></AttachedDevice>'
        for port, uuid in enumerate(attached)
    )
    return (
        '<?xml version="1.0"?><VirtualBox xmlns="http://www.virtualbox.org/" version="1.16-linux"><Machine name="m">'
        f"<MediaRegistry><HardDisks>{disks}</HardDisks></MediaRegistry>"
        f'<StorageControllers><StorageController name="SATA" type="AHCI">{devices}</StorageController>'
        "</StorageControllers></Machine></VirtualBox>"
    ).encode()


def vmx(settings: Mapping[str, str]) -> bytes:
    """A .vmx with these settings."""
    lines = {".encoding": "UTF-8", "config.version": "8", "virtualHW.version": "19", **settings}
    return "".join(f'{key} = "{value}"\n' for key, value in lines.items()).encode()
