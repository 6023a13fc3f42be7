"""The images that the command lines of each guide need, made in the current folder; and what stands for what."""

from __future__ import annotations

import os
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import tapfs
from tests import package_files
from tests.conftest import REPOSITORY

MIB = 1 << 20


def disk(name: str, format_name: str, *, content: bytes = b"tapfs", backing: str | None = None, **options: str) -> None:
    """An image of 16 MiB with a bit of data."""
    if backing is not None:
        tapfs.create(name, format_name, backing=backing, backing_format=tapfs.info(backing)["format"])
    else:
        tapfs.create(name, format_name, 16 * MIB, options=options)
    with tapfs.open(name, format=format_name, writable=True) as image:
        image.write(MIB, content * 5000)


def raw(name: str, *, content: bytes = b"tapfs") -> None:
    """A raw disk with an MBR of two partitions."""
    data = bytearray(16 * MIB)
    for at, start, sectors in ((446, 2048, 4096), (462, 8192, 8192)):
        data[at : at + 16] = struct.pack("<BBBBBBBBII", 0, 0, 0, 0, 0x83, 0, 0, 0, start, sectors)
    data[510:512] = b"\x55\xaa"
    data[5 * MIB : 5 * MIB + 5000] = (content * 1000)[:5000]
    Path(name).write_bytes(data)


def program(name: str, body: str) -> None:
    """A program in the path of the command lines."""
    path = Path("bin", name)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def readme() -> None:
    Path("srv/images").mkdir()
    raw("disk.raw")
    disk("disk.qcow", "qcow")
    disk("disk.vhdx", "vhdx")
    program("upload", "cat >/dev/null")
    fixture = Path("fixtures/blktap/standalone-2007-le-l1.qcow.xz")
    fixture.parent.mkdir(parents=True)
    shutil.copy(REPOSITORY / fixture, fixture)


def bitmaps() -> None:
    for name in ("disk.qcow2", "other.qcow2"):
        disk(name, "qcow2")
    tapfs.add_bitmap("other.qcow2", "monday")


def differences() -> None:
    disk("monday.qcow2", "qcow2")
    shutil.copy("monday.qcow2", "tuesday.qcow2")
    tapfs.convert("monday.qcow2", "monday.raw", target_format="raw")
    with tapfs.open("tuesday.qcow2", writable=True) as image:
        image.write(8 * MIB, b"tuesday")


def damaged() -> None:
    disk("damaged.qcow2", "qcow2")
    with Path("damaged.qcow2").open("r+b") as file:
        (l1,) = struct.unpack_from(">Q", file.read(48), 40)
        file.seek(l1)
        l2 = struct.unpack(">Q", file.read(8))[0] & 0x00FFFFFFFFFFFE00
        file.seek(l2 + 8 * (MIB >> 16))
        file.write(struct.pack(">Q", 1 << 63 | 0x10200))


def streams() -> None:
    disk("disk.qcow2", "qcow2")
    disk("disk.vmdk", "vmdk")
    raw("volume")
    asked = "tapfs convert -O qcow2 /dev/vg/disk -"
    copied = "cat /dev/vg/disk"
    program(
        "ssh",
        f"""shift; [ "$*" = "{copied}" ] && exec cat {os.getcwd()}/volume
[ "$*" = "{asked}" ] && exec tapfs convert -f raw -O qcow2 {os.getcwd()}/volume -""",
    )
    program("curl", 'exec cat "${2##*/}"')
    program("upload", "cat >/dev/null")


def one(name: str, format_name: str) -> Callable[[], None]:
    return lambda: disk(name, format_name)


def several(*names: str) -> Callable[[], None]:
    """Images whose formats their names say."""

    def make() -> None:
        for name in names:
            raw(name) if name.endswith(".raw") else disk(name, name.rpartition(".")[2])

    return make


def served() -> None:
    disk("disk.qcow2", "qcow2")
    tapfs.add_bitmap("disk.qcow2", "monday")
    disk("disk.vhdx", "vhdx")


def packages() -> None:
    tapfs.create("a.qcow2", "qcow2", 4 * MIB)
    content = Path("a.qcow2").read_bytes()
    for name in ("appliance.ova", "old.ova", "new.ova"):
        package_files.ova(Path(name), {"a.qcow2": content, "b.qcow2": content})
    package_files.xva(Path("vm.xva"), {"Ref:7": b"xva" * MIB})


def verified() -> None:
    disk("disk.qcow2", "qcow2")
    tapfs.convert("disk.qcow2", "copy.vmdk", target_format="vmdk")


def root_of_sidecar() -> str:
    """The root that `tapfs hash` printed."""
    return Path("disk.qcow2.tapfs-hash").read_bytes()[40:72].hex()


def remote() -> None:
    disk("disk.qcow2", "qcow2")
    Path("there.raw").write_bytes(bytes(16 * MIB))


def surveyed() -> None:
    Path("srv/images").mkdir()
    Path("password.txt").write_text("secret\n")
    disk("srv/images/base.qcow2", "qcow2")
    disk("srv/images/web1.qcow2", "qcow2", backing=f"{os.getcwd()}/srv/images/base.qcow2")
    ask = "import sqlite3, sys; print(sqlite3.connect(sys.argv[1]).execute(sys.argv[2]).fetchall())"
    program("sqlite3", f'exec "{sys.executable}" -c "{ask}" "$@"')


def batches() -> None:
    disk("a.raw", "raw")
    disk("srv/b.qcow2", "qcow2")
    Path("list.txt").write_text("a.raw a.qcow2 -f raw\nsrv/b.qcow2 b.qcow2\n")
    Path("images.txt").write_text("srv/b.qcow2\n")


def of_xen() -> None:
    for name in ("srv/monday.qcow2", "srv/tuesday.qcow2"):
        disk(name, name.rpartition(".")[2], backing=None if "monday" in name else f"{os.getcwd()}/srv/monday.qcow2")


#: For each guide that has command lines what makes its images.
PREPARE: dict[str, Callable[[], None]] = {
    "docs/batch.md": batches,
    "README.md": readme,
    "docs/bitmaps.md": bitmaps,
    "docs/compact.md": one("disk.qcow2", "qcow2"),
    "docs/convert.md": one("disk.vmdk", "vmdk"),
    "docs/diff-stream.md": differences,
    "docs/faces.md": one("disk.qcow2", "qcow2"),
    "docs/monitoring.md": lambda: None,
    "docs/mount.md": one("disk.qcow2", "qcow2"),
    "docs/nbd.md": served,
    "docs/packages.md": packages,
    "docs/remote.md": remote,
    "docs/report.md": several("disk.qcow2", "overlay.qcow2"),
    "docs/rescue.md": damaged,
    "docs/snapshots.md": one("disk.qcow2", "qcow2"),
    "docs/streams.md": streams,
    "docs/survey.md": surveyed,
    "docs/verify.md": verified,
    "docs/vhost-user.md": one("disk.vhdx", "vhdx"),
    "docs/xen.md": of_xen,
}

#: In the command lines of a guide a text, and what has to stand for it here.
STAND_FOR: dict[str, dict[str, Callable[[], str]]] = {"docs/verify.md": {"73e6…2c": root_of_sidecar}}
