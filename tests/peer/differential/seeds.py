"""Sound images of every format that tapfs and QEMU both read, small, for mutations to begin with.

Left out are kinds that QEMU reads wrongly or not at all while they are sound; the sheets in docs/specs name them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import tapfs
from tests import vhdx_images
from tests.dmg_images import BZIP2, RAW, ZERO, ZLIB
from tests.dmg_images import image as dmg_image
from tests.driver_rows import ROWS
from tests.peer.qcow2_damage.sound import IMAGE, KINDS, PASSWORD, sound
from tests.unit.formats.parallels.test_parallels import IMAGES as PARALLELS
from tests.unit.formats.qed.test_qed import Qed
from tests.vdi_images import DYNAMIC, FIXED, FREE, MIB, VdiImage
from tests.vdi_images import ZERO as ZERO_BLOCK
from tests.vhd_images import FIXED as FIXED_VHD
from tests.vhd_images import Vhd
from tests.vmdk_images import descriptor, random_grains, sectors, sesparse, stream

#: QEMU's name of each format.
FORMATS = {
    "qcow2": "qcow2",
    "qcow": "qcow",
    "vmdk": "vmdk",
    "vhd": "vpc",
    "vhdx": "vhdx",
    "vdi": "vdi",
    "parallels": "parallels",
    "qed": "qed",
    "dmg": "dmg",
    "luks": "luks",
}

#: Words in the names of kinds that need a parent which is not there, or that QEMU reads otherwise while sound.
_LEFT_OUT = {
    "qcow": ("overlay", "encrypted", "little", "stray", "stale", "reserve"),
    "vmdk": ("delta", "unaligned", "left-out"),
    "vhd": ("differencing", "partial", "tail", "batmap"),
    "vhdx": ("differencing", "large sectors", "unlogged"),
}
_PARENT = "parent"
#: Bytes of the largest cluster of qcow2.
_LARGEST = 2 << 20


class Seed(NamedTuple):
    """A sound image: its kind, its files by their names, the one to be opened first, and whether it is encrypted.

    `logged`: QEMU shows its disk only to who may write, because it replays a log into the file.
    """

    kind: str
    files: Mapping[str, bytes]
    encrypted: bool = False
    logged: bool = False


@cache
def seeds(name: str) -> tuple[Seed, ...]:
    """The sound images of a format."""
    return tuple(_MAKERS[name]())


def _of_row(name: str) -> Iterator[Seed]:
    row = ROWS[name]
    for kind in sorted(row.kinds):
        if not any(word in kind for word in _LEFT_OUT[name]):
            file, _ = row.make(kind, row.size, 1)
            # QEMU opens no list of the type custom, and no flat extent without an offset.
            content = bytes(file.data).replace(b"custom", b"vmfsSparse" if kind == "cowd" else b"twoGbMaxExtentSparse")
            content = re.sub(rb'(FLAT "\w+")$', rb"\1 0", content, flags=re.MULTILINE)
            further = {each: bytes(other.data) for each, other in file.further.items()}
            yield Seed(kind, {IMAGE: content if name == "vmdk" else bytes(file.data)} | further)


def _qcow2() -> Iterator[Seed]:
    for name, kind in KINDS.items():
        if kind.cluster <= 1 << 16:
            yield Seed(name, sound(name), kind.encrypted)
    for words, options in (("2 MiB", {}), ("2 MiB, subclusters", {"extended_l2": "on", "refcount_bits": "64"})):
        yield _created("qcow2", words, size=3 * _LARGEST + 33 * 512, options={"cluster_size": str(_LARGEST), **options})


def _qcow() -> Iterator[Seed]:
    yield from _of_row("qcow")
    yield _created("qcow", "encrypted", PASSWORD)
    yield _created("qcow", "overlay")


def _created(
    name: str,
    kind: str,
    password: bytes | None = None,
    *,
    size: int = (1 << 20) + 33 * 512,
    options: Mapping[str, str] | None = None,
) -> Seed:
    """An image that `create` makes, with some data."""
    choice = random.Random(kind)
    with TemporaryDirectory(prefix="tapfs-seeds-") as folder:
        image, files = Path(folder) / IMAGE, dict[str, bytes]()
        backing = _PARENT if kind == "overlay" else None
        if backing is not None:
            files[_PARENT] = choice.randbytes(size * 3 // 4)
            (Path(folder) / _PARENT).write_bytes(files[_PARENT])
        tapfs.create(
            image,
            name,
            size,
            backing=backing,
            backing_format=backing and "raw",
            options=options or {},
            password=password,
        )
        opened = tapfs.open(image, format=name, writable=True, password=password, backing_formats=["raw"])
        with opened as disk:
            for _ in range(4):
                disk.write(choice.randrange(size - 20000), choice.randbytes(choice.randrange(1, 20000)))
            disk.flush()
        return Seed(kind, {IMAGE: image.read_bytes()} | files, password is not None)


def _vmdk() -> Iterator[Seed]:
    yield from _of_row("vmdk")
    size, choice = (1 << 20) + 33 * 512, random.Random(1)
    for kind, footer in (("stream", True), ("stream without a footer", False)):
        yield Seed(kind, {IMAGE: stream(random_grains(choice, size, 1 << 16), size, footer=footer)})
    grains = random_grains(choice, size, 4096, zeros=True)
    text = descriptor([f'RW {sectors(size)} SESPARSE "s"'], create_type="seSparse")
    yield Seed("sesparse", {IMAGE: text, "s": sesparse(grains, size)})


def _vhd() -> Iterator[Seed]:
    yield from _of_row("vhd")
    body = random.Random(1).randbytes(1 << 20)
    for kind, creator in (("fixed", b"win "), ("fixed by its geometry", b"vpc ")):
        image = Vhd(type=FIXED_VHD, size=1 << 20, body=body, creator=creator, geometry=(30, 4, 17))
        yield Seed(kind, {IMAGE: image.content()})


def _vhdx() -> Iterator[Seed]:
    yield from _of_row("vhdx")
    for start in (0, vhdx_images.LOG_BYTES - 8192):
        yield Seed(f"log from {start} on", {IMAGE: _logged(start)}, logged=True)


def _logged(start: int) -> bytes:
    """An image whose log has a block and zeros that the file lacks yet, in two entries from `start` of the ring on."""
    choice = random.Random(1)
    image = vhdx_images.Image(3 * MIB + 33 * 512)
    image.blocks = {number: (vhdx_images.PRESENT, choice.randbytes(MIB)) for number in (0, 2)}
    before = image.build()
    image.blocks[1] = (vhdx_images.PRESENT, choice.randbytes(MIB))
    after = image.build()
    page = slice(vhdx_images.BAT_AT, vhdx_images.BAT_AT + 4096)
    changed, old = bytes(after[page]), bytes(before[page])
    after[page] = before[page]
    zeros = vhdx_images.Entry(
        1, [(vhdx_images.BAT_AT, old), (vhdx_images.BAT_AT + 8192, 16384)], tail=start, last=len(after)
    )
    entry = vhdx_images.Entry(2, [(vhdx_images.BAT_AT, changed)], tail=start, last=len(after))
    vhdx_images.put_log(after, [zeros, entry], start=start)
    return bytes(after)


def _vdi() -> Iterator[Seed]:
    """With blocks of 1 MiB, because QEMU reads no others."""
    slots = {number: random.Random(number).randbytes(MIB) for number in range(3)}
    size = 3 * MIB + 7 * 512
    for kind, entries in (("dynamic", (1, FREE, ZERO_BLOCK, 0)), ("fixed", (0, 1, 2, 3))):
        slots = slots if kind == "dynamic" else {**slots, 3: bytes(MIB)}
        made = VdiImage(size, entries, slots, FIXED if kind == "fixed" else DYNAMIC, map_at=512, data_at=1024)
        yield Seed(kind, {IMAGE: made.content()})


def _qed() -> Iterator[Seed]:
    yield Seed("small clusters", {IMAGE: Qed().content()})
    yield Seed("large tables", {IMAGE: Qed(table_clusters=4, cluster=8192, size=1100 * 8192).content()})
    yield Seed("raw parent", {IMAGE: Qed(features=1 | 4, name=b"parent").content(), _PARENT: b"parent" * 100_000})


def _parallels() -> Iterator[Seed]:
    for kind in ("new", "old", "old, data right behind the table", "more entries than the disk has"):
        yield Seed(kind, {IMAGE: PARALLELS[kind].content()})


def _dmg() -> Iterator[Seed]:
    choice = random.Random(1)
    for kind, packed in (("raw", RAW), ("zlib", ZLIB), ("bzip2", BZIP2)):
        for resources in (False, True):
            blocks = [(packed, choice.randbytes(64) * 8 * count) for count in (64, 100, 7, 256, 1)]
            blocks.insert(2, (ZERO, bytes(300 * 512)))
            parts = [(0, [(packed, bytes(range(256)) * 80)]), (40, blocks)]
            where = "resources" if resources else "property list"
            yield Seed(f"{kind}, {where}", {IMAGE: dmg_image(parts, resources=resources)})


def _luks() -> Iterator[Seed]:
    options = {"iter-time": "1"}
    yield _created("luks", "xts", PASSWORD, options=options)
    yield _created("luks", "cbc", PASSWORD, options={**options, "cipher-mode": "cbc", "ivgen-alg": "essiv"})


_MAKERS: dict[str, Callable[[], Iterator[Seed]]] = {
    "qcow2": _qcow2,
    "qcow": _qcow,
    "vmdk": _vmdk,
    "vhd": _vhd,
    "vhdx": _vhdx,
    "vdi": _vdi,
    "parallels": _parallels,
    "qed": _qed,
    "dmg": _dmg,
    "luks": _luks,
}
