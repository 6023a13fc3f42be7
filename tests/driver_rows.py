"""A row for each writable format: its images of every kind, made byte by byte or by `create`, and who else reads them.

tests/property/test_drivers.py and tests/crash/test_driver_plans.py run the suites of the kit over the rows.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import cast

from tapfs.driver import Checkable, Driver, Format, OpenRequest
from tapfs.formats import qcow, qcow2, vdi, vhd, vhdx, vmdk
from tapfs.testing.model import SECTOR, MemoryFile
from tapfs.testing.subject import Subject
from tests import qcow2_images, qcow_images, vdi_images, vhd_images, vhdx_images, vmdk_disks

#: What makes an image of a kind, of a size and from a seed: the file, and the bytes of the disk below.
Maker = Callable[[str, int, int], tuple[MemoryFile, bytes]]
Damage = Callable[[MemoryFile], None]


@dataclass(frozen=True)
class Made(Subject):
    """The images of one kind."""

    make: Maker | None = None
    kind: str = ""

    def begin(self, choice: random.Random) -> tuple[MemoryFile, bytes]:
        assert self.make is not None
        return self.make(self.kind, self.size, choice.randrange(1000))


class Vdi(Made):
    def readers(self, file: MemoryFile, parent: bytes, *, crashed: bool) -> Mapping[str, bytes]:
        del crashed
        return {"who counts on the header": vdi_images.by_bytes(bytes(file.data), parent)}


class Vhd(Made):
    #: Kinds in which a sector without its bit holds zeros, so that QEMU, which ignores bitmaps, reads the same.
    SAME_TO_QEMU = frozenset({"dynamic", "dynamic-small-blocks", "dynamic-large-blocks"})

    def readers(self, file: MemoryFile, parent: bytes, *, crashed: bool) -> Mapping[str, bytes]:
        raw = bytes(file.data)
        found = {"who knows only the copy of the footer": vhd_images.by_bytes(raw, parent)}
        if self.kind in self.SAME_TO_QEMU and not crashed:
            found["who ignores bitmaps"] = vhd_images.ignoring_bitmaps(raw)
        return found


class Vmdk(Made):
    def readers(self, file: MemoryFile, parent: bytes, *, crashed: bool) -> Mapping[str, bytes]:
        """By the redundant tables alone, as a tool reads the disk that is told that the primary ones are lost."""
        del crashed
        turned = file.copy()
        for each in (turned, *turned.further.values()):
            if each.data.startswith(b"KDMV") and each.data[8] & 2:
                redundant, primary = struct.unpack_from("<QQ", each.data, 48)
                # A table that is in the primary directory only has a twin later: the primary one has all of it.
                (capacity,) = struct.unpack_from("<Q", each.data, 12)
                (entries,) = struct.unpack_from("<I", each.data, 44)
                for index in range(-(-capacity // (entries * each.data[20]))):
                    at, twin = primary * SECTOR + 4 * index, redundant * SECTOR + 4 * index
                    if any(each.data[twin : twin + 4]):
                        each.data[at : at + 4] = each.data[twin : twin + 4]
        return {"the redundant tables": self.whole(turned, parent)}


class Qcow(Made):
    #: Kinds whose fast path is alive: writing keeps it so, for the cksum follows L1.
    LIVE = frozenset({"blktap", "blktap-little", "blktap-reserve"})
    #: Kinds whose L1 gives every cluster under a wrong cksum: a repair revives them, unless a write came before it.
    REVIVED = frozenset({"blktap-stale", "blktap-stray"})

    def readers(self, file: MemoryFile, parent: bytes, *, crashed: bool) -> Mapping[str, bytes]:
        del parent
        driver = qcow.FORMAT.open(file, OpenRequest())
        if not crashed:
            self._look_at_the_header(file, driver)
        # What tapfs found under a stray header copy blktap could not read, until tapfs wrote the image.
        stray = any("stray" in finding.message for finding in cast("Checkable", driver).check().findings)
        if self.kind.startswith("blktap") and not stray:
            return {"blktap": qcow_images.by_blktap(bytes(file.data))}
        return {}

    def _look_at_the_header(self, file: MemoryFile, driver: Driver) -> None:
        # Under a cipher blktap's way of allocating cannot be followed: the first change ends it.
        unwritten = self.kind == "blktap-live-encrypted" and int.from_bytes(file.data[56:60], "big") != 1
        alive = driver.details()["fast_path"]
        assert alive == (self.kind in self.LIVE or unwritten) or (alive and self.kind in self.REVIVED)
        order = driver.details()["l1_byte_order"]
        # A repair may give L1 the usual order.
        assert order == "big" or self.kind.endswith("little")


class Qcow2(Made):
    def readers(self, file: MemoryFile, parent: bytes, *, crashed: bool) -> Mapping[str, bytes]:
        del crashed
        return {"the second reader": qcow2_images.by_hand(bytes(file.data), parent)}

    def leaks(self, file: MemoryFile, parent: bytes, snapshots: Mapping[str, bytes]) -> int:
        data = bytes(file.data)
        for number, content in enumerate(snapshots.values()):
            assert qcow2_images.by_hand(data, parent, snapshot=number) == content
        found = qcow2_images.audit(data)
        assert found.corruptions == []
        return len(found.leaks)


def _vhdx(kind: str, size: int, seed: int) -> tuple[MemoryFile, bytes]:
    data, parent = vhdx_images.make(kind, size, seed)
    return MemoryFile(bytes(data)), parent


# -- damage that a repair mends without touching guest data ------------------------------------------------


def _put(at: int, content: bytes) -> Damage:
    def damage(file: MemoryFile) -> None:
        place = at % len(file.data)
        file.data[place : place + len(content)] = content

    return damage


def _flip(*places: int) -> Damage:
    def damage(file: MemoryFile) -> None:
        for at in places:
            file.data[at] ^= 1

    return damage


def _leak(length: int, behind: int = 0) -> Damage:
    """Put bytes that nothing refers to at the end, or before so many bytes of it."""

    def damage(file: MemoryFile) -> None:
        at = len(file.data) - behind
        file.data[at:at] = b"leak" * (length // 4)

    return damage


def _vhd_batmap(file: MemoryFile) -> None:
    file.data[file.data.index(b"tdbatmap") + 24] ^= 1


def _vhdx_headers(file: MemoryFile) -> None:
    _flip(vhdx_images.REGION_TABLES[0] + 20, (64 << 10) + 30)(file)
    file.data += b"leak" * (1 << 18)


def _vmdk(what: str) -> Damage:
    """Damage a directory or a table of each sparse file, and leave something that nothing refers to behind it."""

    def damage(file: MemoryFile) -> None:
        for each in (file, *file.further.values()):
            if not each.data.startswith(b"KDMV"):
                continue
            (directory,) = struct.unpack_from("<Q", each.data, 56)
            (table,) = struct.unpack_from("<I", each.data, directory * SECTOR)
            match what:
                case "entry":
                    struct.pack_into("<I", each.data, directory * SECTOR, 0)
                case "table":
                    struct.pack_into("<I", each.data, table * SECTOR + 8, 0xFFFFFFF0)
                case "directory":
                    struct.pack_into("<Q", each.data, 56, 1 << 40)
                case _:
                    pass
            each.data.extend(bytes(-len(each.data) % 8192) + b"leak" * 2048)

    return damage


def _qcow2(what: str) -> Damage:
    """Damage refcounts, or the bits that follow from them."""

    def damage(file: MemoryFile) -> None:
        data = file.data
        fields = qcow2_images.Fields(bytes(data))
        block = fields.number(fields.reftable_at, 8)
        if what == "leak":
            at = block + 2 * (len(data) // fields.cluster % (fields.cluster // 2))
            data.extend(bytes(fields.cluster))
            data[at : at + 2] = b"\0\5"
        elif what == "low":
            data[block : block + 8] = bytes(8)
        elif what == "no block":
            data[fields.reftable_at : fields.reftable_at + 8] = (block + 512 + fields.cluster * 1000).to_bytes(8, "big")
        elif what == "two owners":  # an entry of zeros names the cluster of another entry
            l1 = (fields.number(at, 8) for at in range(fields.l1_at, len(data), 8))
            table = next(word for word in l1 if word) & qcow2_images.OFFSET_MASK
            entries = range(table, table + fields.per_table * fields.entry, fields.entry)
            place = next(
                word
                for at in entries
                if (word := fields.number(at, 8)) & qcow2_images.OFFSET_MASK and not word & qcow2_images.COMPRESSED
            )
            zeros = next(at for at in entries if fields.number(at, 8) == 0)
            data[zeros : zeros + 8] = (place | qcow2_images.ZERO).to_bytes(8, "big")
        elif what == "bits":
            data[next(at for at in range(fields.l1_at, len(data), 8) if any(data[at : at + 8]))] ^= 0x80
        else:
            data[79] |= 1

    return damage


# -- rows ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A format, and how much of what its tests do.

    `size` of the disks in bytes. `requests` and `crashes` of each image of each kind. A wrong order of the stages of
    `writer.flush` shows in the kinds `ordered`, from a seed on. Each damage comes with the kinds that have it. `torn`:
    kinds in which a crash may tear any sector of the guest, whatever a driver does.
    """

    format: Format
    make: Maker
    kinds: Collection[str]
    size: int
    writer: str
    ordered: Collection[tuple[str, str, int]]
    damages: Mapping[str, tuple[Collection[str], Damage]]
    of: type[Made] = Made
    requests: int = 40
    crashes: int = 30
    torn: Collection[str] = ()
    may_leak: Collection[str] = ()
    edited: bool = False

    def subject(self, kind: str) -> Made:
        """The images of a kind."""
        may_leak = kind in self.may_leak
        return self.of(self.format, self.size, may_leak=may_leak, edited=self.edited, make=self.make, kind=kind)


def _orders(*kinds: str, **first_seeds: int) -> list[tuple[str, str, int]]:
    """Both wrong orders of each kind; the seed in which "one stage" shows first, where that is not the first seed."""
    return [(kind, order, first_seeds.get(kind, 0)) for kind in kinds for order in ("reversed", "one stage")]


_QCOW2_DAMAGED = ("plain", "small clusters", "snapshot")
_VMDK_DAMAGED = ("monolithic", "split-delta", "unclean", "zeroed-delta")

ROWS: dict[str, Row] = {
    "qcow": Row(
        qcow.FORMAT,
        qcow_images.make,
        qcow_images.KINDS,
        3 * 512 * 1024 + (2 << 20),
        "tapfs.formats.qcow.writer.WritableQcowDriver",
        _orders("qemu", "blktap", "overlay", qemu=17, overlay=6),
        {"leak": (("blktap-little", "blktap-stray", "overlay-12byte-little", "overlay-12byte", "qemu"), _leak(8192))},
        Qcow,
    ),
    "qcow2": Row(
        qcow2.FORMAT,
        qcow2_images.make,
        qcow2_images.KINDS,
        1_200_000 // 512 * 512 + 512,
        "tapfs.formats.qcow2.writer.WritableQcow2Driver",
        _orders("plain", "overlay", "snapshot"),
        {what: (_QCOW2_DAMAGED, _qcow2(what)) for what in ("leak", "low", "no block", "bits", "dirty", "two owners")},
        Qcow2,
        requests=60,
        crashes=110,
        edited=True,
    ),
    "vdi": Row(
        vdi.FORMAT,
        vdi_images.make,
        vdi_images.KINDS,
        9 * vdi_images.SMALL + 1536,
        "tapfs.formats.vdi.writer.WritableVdiDriver",
        _orders("dynamic", "differencing-extra"),
        {
            "count behind": (("extra",), _put(388, (1).to_bytes(4, "little"))),
            "count ahead": (("extra",), _put(388, (99).to_bytes(4, "little"))),
            "leak": (("extra",), _leak(40_000)),
        },
        Vdi,
        # The blocks of an image with the old header begin inside a sector of the host.
        torn=("old",),
    ),
    "vhd": Row(
        vhd.FORMAT,
        vhd_images.make,
        vhd_images.KINDS,
        3 * (1 << 17) + (1 << 20),
        "tapfs.formats.vhd.writer.WritableDynamicDriver",
        _orders("dynamic-small-blocks", "differencing"),
        {
            "last footer": (("batmap",), _put(-512, bytes(512))),
            "copy": (("batmap",), _put(0, bytes(8))),
            "header checksum": (("batmap",), _flip(512 + 36)),
            "batmap": (("batmap",), _vhd_batmap),
            "leak": (("batmap",), _leak(40_000, 512)),
        },
        Vhd,
        may_leak=("dynamic-tail",),
    ),
    "vhdx": Row(
        vhdx.FORMAT,
        _vhdx,
        vhdx_images.KINDS,
        (4 << 20) + 3 * 4096,
        "tapfs.formats.vhdx.writer.WritableVhdxDriver",
        _orders("dynamic", "differencing", dynamic=5, differencing=1),
        {"headers": (("dynamic", "differencing"), _vhdx_headers)},
        requests=30,
        crashes=16,
    ),
    "vmdk": Row(
        vmdk.FORMAT,
        vmdk_disks.make,
        vmdk_disks.KINDS,
        3 * 512 * 1024 + 1536,
        "tapfs.formats.vmdk.writer.WritableVmdkDriver",
        # A wrong order shows only where two halves of one change are torn apart.
        [
            *[(kind, "reversed", 0) for kind in ("monolithic-tables-left-out", "cowd", "cowd-delta")],
            ("cowd", "one stage", 0),
        ],
        {what: (_VMDK_DAMAGED, _vmdk(what)) for what in ("entry", "table", "directory", "none")},
        Vmdk,
        crashes=16,
    ),
}

#: Each row with each of its kinds.
ALL = [(name, kind) for name, row in ROWS.items() for kind in sorted(row.kinds)]
