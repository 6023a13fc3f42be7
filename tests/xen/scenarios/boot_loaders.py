"""Guests whose boot loader reads the kernel from a disk of tapfs: PyGrub in domain 0, and GRUB in the guest."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.laboratory.commands import run, tapfs
from tests.laboratory.scenario import scenario
from tests.xen.scenarios.contents import new_raw
from tests.xen.scenarios.dom0 import IMAGES, Dom0, xl_disk
from tests.xen.scenarios.guest import ARGUMENTS, KERNEL, guest_initramfs

_MEBIBYTES = 96
#: Where the only partition begins, and what is behind its file system.
_FIRST_MEBIBYTE = 1


def _menu(word: str) -> str:
    """GRUB's configuration; the kernel is told a word by which the guest knows it."""
    return (
        "set timeout=0\nset default=0\nmenuentry 'guest' {\n"
        f"  linux /boot/linux {ARGUMENTS} {word}\n  initrd /boot/initramfs\n}}\n"
    )


def _bootable() -> Path:
    """A raw image with a partition that holds the guests' kernel, their initramfs and a configuration of GRUB."""
    image, content = IMAGES / "bootable.img", IMAGES / "content"
    if image.exists():
        return image
    boot = content / "boot"
    (boot / "grub").mkdir(parents=True)
    shutil.copy(KERNEL, boot / "linux")
    (boot / "initramfs").write_bytes(guest_initramfs())
    (boot / "grub/grub.cfg").write_text(_menu("first"), encoding="ascii")
    sectors = (_MEBIBYTES - _FIRST_MEBIBYTE) * 2048
    new_raw(image.name, _MEBIBYTES)
    with image.open("r+b") as file:
        file.seek(446)
        entry = (0x80, 0, 2, 0, 0x83, 0xFE, 0xFF, 0xFF)
        file.write(bytes(entry) + (2048).to_bytes(4, "little") + sectors.to_bytes(4, "little"))
        file.seek(510)
        file.write(b"\x55\xaa")
    options = ("-q", "-F", "-t", "ext4", "-E", f"offset={_FIRST_MEBIBYTE << 20}", "-d", str(content))
    run("mke2fs", *options, str(image), f"{sectors // 2}k", limit=90)
    shutil.rmtree(content)
    return image


def _boot_twice(dom0: Dom0, kind: str, loader: str) -> None:
    """Boot from an overlay, have the guest change what the loader reads, and reboot: the loader finds the change."""
    image = IMAGES / f"{kind}.qcow"
    tapfs("create", "--force", "-f", "qcow", "-b", str(_bootable()), "-F", "raw", str(image))
    disks = (xl_disk(f"tap:qcow:{image}", "xvda"),)
    with dom0.guest("booted", kind, disks, mebibytes=256, loader=loader) as guest:
        guest.run("grep -w first /proc/cmdline")
        guest.wait_for_disk("xvda1")
        guest.run("mount /dev/xvda1 /mnt && sed -i s/first/second/ /mnt/boot/grub/grub.cfg && umount /mnt")
        guest.reboot()
        guest.run("grep -w second /proc/cmdline")
        guest.power_off()
    tapfs("check", str(image))


@scenario(240)
def pygrub(dom0: Dom0) -> None:
    """PyGrub reads the disk in domain 0, to which libxl attaches it for that; then the PVH guest gets it."""
    _boot_twice(dom0, "pvh", 'bootloader = "pygrub"\nbootloader_args = ["--quiet"]')


@scenario(240)
def pvgrub(dom0: Dom0) -> None:
    """GRUB in a PV guest has a driver of its own for the disk; Linux takes the disk over from it."""
    _boot_twice(dom0, "pv", 'kernel = "/usr/lib/grub-xen/grub-x86_64-xen.bin"')
