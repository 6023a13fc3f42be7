"""Packages beside what others make of them: tar and qemu-img read the same disk, dissect lists the same disks."""

from __future__ import annotations

import io
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dissect.hypervisor.descriptor.ovf import OVF
from dissect.hypervisor.descriptor.vmx import VMX

import tapfs as api
from tests import package_files

Run = Callable[..., Any]


def test_a_member_is_what_tar_unpacks_and_qemu_reads(tapfs: Run, tmp_path: Path) -> None:
    """Each archiver writes its own headers; names of more than 100 bytes need further ones."""
    long = f"{'n' * 120}.vmdk"
    (tmp_path / "raw").write_bytes(bytes(1 << 20) + b"data" * 1024 + bytes(1 << 20))
    options = ["-O", "vmdk", "-o", "subformat=streamOptimized"]
    subprocess.run(["qemu-img", "convert", "-f", "raw", *options, "raw", long], cwd=tmp_path, check=True)
    (tmp_path / "x.ovf").write_bytes(package_files.ovf([long]))
    for maker in (["tar", "--format=gnu", "-cf"], ["tar", "--format=posix", "-cf"], ["7zz", "a", "-bso0", "-ttar"]):
        path = tmp_path / f"{maker[1].strip('-=')}.ova"
        subprocess.run([*maker, path, "x.ovf", long], cwd=tmp_path, check=True)
        (tmp_path / "out").mkdir(exist_ok=True)
        subprocess.run(["tar", "-C", tmp_path / "out", "-xf", path], check=True)
        assert tapfs("convert", "-O", "raw", path, tmp_path / "ours").code == 0
        subprocess.run(
            ["qemu-img", "compare", "-f", "vmdk", "-F", "raw", tmp_path / "out" / long, tmp_path / "ours"], check=True
        )


def test_descriptors_list_the_disks_that_dissect_finds(tmp_path: Path) -> None:
    """The files are not there, so every disk has an error, and is listed."""
    machine = {"scsi0:0.fileName": "one.vmdk", "scsi0:0.present": "TRUE", "sata1:3.fileName": "two.vmdk"}
    machine |= {"sata1:3.present": "TRUE", "ide0:0.fileName": "auto detect", "ide0:0.deviceType": "cdrom-raw"}
    contents = {
        "x.vmx": package_files.vmx(machine),
        "x.ovf": package_files.ovf(["one.vmdk", "two.vmdk"]),
    }
    readers: dict[str, Callable[[str], Iterable[str]]] = {
        "x.vmx": lambda text: VMX.parse(text).disks(),
        "x.ovf": lambda text: OVF(io.StringIO(text)).references.values(),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        listed = api.package_info(tmp_path / name)
        assert listed is not None
        assert sorted(disk["name"] for disk in listed["disks"]) == sorted(readers[name](content.decode()))
        assert all("is missing" in str(disk["error"]) for disk in listed["disks"])
