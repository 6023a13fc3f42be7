"""qcow2 images made by hand for tests, and a second reader and checker of them, written independently of the driver.

Everything here steps through tables entry by entry, with numbers from QEMU's docs/interop/qcow2 and nothing else.
"""

from __future__ import annotations

import random
import struct
import subprocess
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from tapfs.driver import BackingReference, CreateRequest, OpenRequest, Streamable, WritableDriver
from tapfs.formats.qcow2 import FORMAT
from tapfs.plan import Write
from tapfs.testing.model import MemoryFile, ModelDisk

OFFSET_MASK = 0x00FFFFFFFFFFFE00
COPIED, COMPRESSED, ZERO = 1 << 63, 1 << 62, 1


class NotReadableError(Exception):
    """The image says something that cannot be."""


@dataclass
class Fields:
    """The header, as far as the second reader needs it."""

    data: bytes

    def number(self, at: int, width: int) -> int:
        return int.from_bytes(self.data[at : at + width], "big")

    def words(self, at: int, count: int, step: int = 8) -> Iterator[tuple[int, int]]:
        """Where each of so many words lies that is not zero, every `step` bytes, and the word. None: behind the end."""
        inside = self.data[at : at + count * step]
        for index, word in enumerate(
            struct.unpack(f">{len(inside) // 8}Q", inside[: len(inside) // 8 * 8])[:: step // 8]
        ):
            if word:
                yield at + index * step, word

    def __post_init__(self) -> None:
        self.version = self.number(4, 4)
        self.bits = self.number(20, 4)
        self.cluster = 1 << self.bits
        self.size = self.number(24, 8)
        self.l1_entries, self.l1_at = self.number(36, 4), self.number(40, 8)
        self.reftable_at, self.reftable_clusters = self.number(48, 8), self.number(56, 4)
        self.snapshot_count, self.snapshots_at = self.number(60, 4), self.number(64, 8)
        later = self.version == 3
        self.incompatible = self.number(72, 8) if later else 0
        self.autoclear = self.number(88, 8) if later else 0
        self.refcount_bits = 1 << (self.number(96, 4) if later else 4)
        self.zstd = later and self.number(100, 4) > 104 and self.data[104] == 1
        self.extended = bool(self.incompatible & 16)
        self.external = bool(self.incompatible & 4)
        self.entry = 16 if self.extended else 8
        self.per_table = self.cluster // self.entry

    def extensions(self) -> Iterator[tuple[int, bytes]]:
        at = 72 if self.version == 2 else self.number(100, 4)
        end = self.number(8, 8) or self.cluster
        while at + 8 <= end:
            kind, length = self.number(at, 4), self.number(at + 4, 4)
            if kind == 0:
                return
            yield kind, self.data[at + 8 : at + 8 + length]
            at += 8 + (length + 7) // 8 * 8


def by_hand(data: bytes, backing: bytes = b"", outside: bytes = b"", snapshot: int | None = None) -> bytes:
    """The guest's disk; `outside` is the data file. `snapshot` is the number of one in the table."""
    fields = Fields(data)
    l1_at, size = fields.l1_at, fields.size
    if snapshot is not None:
        l1_at, _, size = list(snapshots(fields))[snapshot][:3]
    out = bytearray(backing[:size].ljust(size, b"\0"))
    for number in range((size + fields.cluster - 1) // fields.cluster):
        table = fields.number(l1_at + 8 * (number // fields.per_table), 8) & OFFSET_MASK
        if table == 0:
            continue
        at = table + number % fields.per_table * fields.entry
        for start, piece in cluster_pieces(fields, at, outside):
            begin = number * fields.cluster + start
            out[begin : min(begin + len(piece), size)] = piece[: max(0, size - begin)]
    return bytes(out)


def cluster_pieces(fields: Fields, at: int, outside: bytes) -> Iterator[tuple[int, bytes]]:
    """What the entry at `at` puts into its cluster, as offsets in the cluster and bytes."""
    entry, place = fields.number(at, 8), fields.number(at, 8) & OFFSET_MASK
    if entry & COMPRESSED:
        yield 0, unpacked(fields, entry)
        return
    source = outside if fields.external else fields.data
    whole = source[place : place + fields.cluster].ljust(fields.cluster, b"\0")
    if not fields.extended:
        if entry & ZERO and fields.version == 3:
            yield 0, bytes(fields.cluster)
        elif place or (fields.external and entry & COPIED):
            yield 0, whole
        return
    bitmap, length = fields.number(at + 8, 8), fields.cluster // 32
    for sub in range(32):
        if bitmap >> sub & 1:
            yield sub * length, whole[sub * length : (sub + 1) * length]
        elif bitmap >> (32 + sub) & 1:
            yield sub * length, bytes(length)


def unpacked(fields: Fields, entry: int) -> bytes:
    """The cluster in a compressed entry."""
    start, length = packed_range(fields, entry)
    payload = fields.data[start : start + length]
    if fields.zstd:
        ran = subprocess.run(["zstd", "-q", "-d", "-c", "-"], input=payload, capture_output=True, check=False)
        found = ran.stdout
    else:
        found = zlib.decompressobj(-15).decompress(payload, fields.cluster)
    if len(found) < fields.cluster:
        raise NotReadableError(f"a payload of {len(found)} bytes")
    return found[: fields.cluster]


def packed_range(fields: Fields, entry: int) -> tuple[int, int]:
    """Start and length of a compressed entry's sectors."""
    width = 62 - (fields.bits - 8)
    start = entry & ((1 << width) - 1)
    sectors = (entry & (COMPRESSED - 1)) >> width
    return start, (sectors + 1) * 512 - (start & 511)


def snapshots(fields: Fields) -> Iterator[tuple[int, int, int, str, int]]:
    """L1 offset, L1 entries, disk size, name, and where the entry ends."""
    at = fields.snapshots_at
    for _ in range(fields.snapshot_count):
        l1_at, l1_entries = fields.number(at, 8), fields.number(at + 8, 4)
        id_length, name_length = fields.number(at + 12, 2), fields.number(at + 14, 2)
        extra = fields.number(at + 36, 4)
        size = fields.number(at + 48, 8) if extra >= 16 else fields.size
        name_at = at + 40 + extra + id_length
        end = name_at + name_length
        yield l1_at, l1_entries, size, fields.data[name_at:end].decode(errors="replace"), end
        at = (end + 7) // 8 * 8


def references(data: bytes) -> Counter[int]:
    """How many references the image's metadata has to each of its clusters."""
    fields = Fields(data)
    found: Counter[int] = Counter()

    def refer(start: int, length: int) -> None:
        if length:
            for cluster in range(start // fields.cluster, (start + length - 1) // fields.cluster + 1):
                found[cluster] += 1

    refer(0, fields.cluster)
    refer(fields.reftable_at, fields.reftable_clusters * fields.cluster)
    for _, block in fields.words(fields.reftable_at, fields.reftable_clusters * fields.cluster // 8):
        refer(block, fields.cluster)
    tables = [(fields.l1_at, fields.l1_entries)]
    if fields.snapshot_count:
        listed = list(snapshots(fields))
        refer(fields.snapshots_at, listed[-1][4] - fields.snapshots_at)
        tables += [(each[0], each[1]) for each in listed]
    for l1_at, entries in tables:
        refer(l1_at, 8 * entries)
        for index in range(entries):
            table = fields.number(l1_at + 8 * index, 8) & OFFSET_MASK
            if table == 0:
                continue
            refer(table, fields.cluster)
            for _, entry in fields.words(table, fields.per_table, fields.entry):
                if entry & COMPRESSED:
                    refer(*packed_range(fields, entry))
                elif entry & OFFSET_MASK and not fields.external:
                    refer(entry & OFFSET_MASK, fields.cluster)
    for kind, content in fields.extensions():
        if kind == 0x0537BE77:
            refer(*struct.unpack(">QQ", content[:16]))
        if kind == 0x23852875:
            length, start = struct.unpack(">QQ", content[8:24])
            refer(start, length)
            for table, table_entries in bitmap_tables(data, start, length):
                refer(table, 8 * table_entries)
                for _, word in fields.words(table, table_entries):
                    if word & OFFSET_MASK:
                        refer(word & OFFSET_MASK, fields.cluster)
    return found


def bitmap_tables(data: bytes, start: int, length: int) -> Iterator[tuple[int, int]]:
    """Place and entries of each bitmap's table."""
    at = start
    while at < start + length:
        table, entries, _, _, _, name, extra = struct.unpack_from(">QIIBBHI", data, at)
        yield table, entries
        at += (24 + extra + name + 7) // 8 * 8


def refcount(fields: Fields, cluster: int) -> int:
    """The refcount of a cluster as it stands in the image."""
    per_block = fields.cluster * 8 // fields.refcount_bits
    index, inside = divmod(cluster, per_block)
    if index >= fields.reftable_clusters * fields.cluster // 8:
        return 0
    block = fields.number(fields.reftable_at + 8 * index, 8)
    if block == 0:
        return 0
    if fields.refcount_bits >= 8:
        width = fields.refcount_bits // 8
        return fields.number(block + inside * width, width)
    per_byte = 8 // fields.refcount_bits
    byte = fields.number(block + inside // per_byte, 1)
    return byte >> inside % per_byte * fields.refcount_bits & ((1 << fields.refcount_bits) - 1)


@dataclass
class Audit:
    """What the second checker finds."""

    corruptions: list[str] = field(default_factory=list[str])
    leaks: list[int] = field(default_factory=list[int])


def audit(data: bytes) -> Audit:
    """Compare references, refcounts and the bits that say "owned alone"."""
    fields = Fields(data)
    wanted = references(data)
    result = Audit()
    clusters = max([(len(data) + fields.cluster - 1) // fields.cluster, *(each + 1 for each in wanted)])
    for cluster in range(clusters):
        count, references_ = refcount(fields, cluster), wanted[cluster]
        if count < references_:
            result.corruptions.append(f"cluster {cluster} has refcount {count} and {references_} references")
        elif count > references_:
            result.leaks.append(cluster)
    for index in range(fields.l1_entries):
        entry = fields.number(fields.l1_at + 8 * index, 8)
        table = entry & OFFSET_MASK
        if table == 0:
            continue
        _audit_copied(fields, result, f"L1 entry {index}", entry)
        for at, word in fields.words(table, fields.per_table, fields.entry):
            if word & COMPRESSED:
                if word & COPIED:
                    result.corruptions.append(f"the compressed entry at {at:#x} is owned alone")
            elif word & OFFSET_MASK and not fields.external:
                _audit_copied(fields, result, f"the entry at {at:#x}", word)
    return result


def _audit_copied(fields: Fields, result: Audit, what: str, entry: int) -> None:
    alone = refcount(fields, (entry & OFFSET_MASK) // fields.cluster) == 1
    if bool(entry & COPIED) != alone:
        result.corruptions.append(f"{what} is {entry:#x}, and its refcount says otherwise")


@dataclass
class Plain:
    """A small image made by hand: one L2 table, whose entries are given.

    `entries` are numbers, one for each cluster (pairs of words for `extended`). `content` has bytes of host clusters.
    The file has: header, refcount table, refcount block, L1, L2, then data from cluster 5 on.
    """

    size: int
    cluster_bits: int = 16
    version: int = 3
    entries: Mapping[int, int | tuple[int, int]] = field(default_factory=dict[int, "int | tuple[int, int]"])
    content: Mapping[int, bytes] = field(default_factory=dict[int, bytes])
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    compression: int = 0
    extensions: Sequence[tuple[int, bytes]] = ()
    backing: bytes = b""
    end_mark: bool = True
    header_length: int = 112
    l1_entries: int = 1
    file_clusters: int = 8

    def build(self) -> bytes:
        cluster = 1 << self.cluster_bits
        image = bytearray(cluster * self.file_clusters)
        later = self.version == 3
        tail = b"".join(
            struct.pack(">II", kind, len(data)) + data.ljust((len(data) + 7) // 8 * 8, b"\0")
            for kind, data in self.extensions
        )
        tail += bytes(8) if self.end_mark else b""
        at = self.header_length if later else 72
        name_at = at + len(tail) if self.backing else 0
        struct.pack_into(
            ">4sIQIIQIIQQIIQ",
            image,
            0,
            *(b"QFI\xfb", self.version, name_at, len(self.backing), self.cluster_bits, self.size, 0),
            *(self.l1_entries, 3 * cluster, cluster, 1, 0, 0),
        )
        if later:
            bits = (self.incompatible, self.compatible, self.autoclear)
            struct.pack_into(">QQQII", image, 72, *bits, 4, self.header_length)
            if self.header_length > 104:
                image[104] = self.compression
        image[at : at + len(tail)] = tail
        image[name_at : name_at + len(self.backing)] = self.backing or image[:0]
        struct.pack_into(">Q", image, cluster, 2 * cluster)
        if self.l1_entries:
            struct.pack_into(">Q", image, 3 * cluster, 4 * cluster | COPIED)
        for number, entry in self.entries.items():
            words = entry if isinstance(entry, tuple) else (entry,)
            struct.pack_into(f">{len(words)}Q", image, 4 * cluster + number * 8 * len(words), *words)
        for number, content in self.content.items():
            image[number * cluster : number * cluster + len(content)] = content
        del image[self.file_clusters * cluster :]
        for used, count in references(bytes(image)).items():
            if used * 2 < cluster:
                struct.pack_into(">H", image, 2 * cluster + 2 * used, count)
        return bytes(image)


def packed_entry(start: int, length: int, cluster_bits: int) -> int:
    """A compressed entry for a payload of `length` bytes at `start`."""
    sectors = ((start & 511) + length + 511) // 512
    return COMPRESSED | (sectors - 1) << (62 - (cluster_bits - 8)) | start


def deflated(data: bytes) -> bytes:
    """As QEMU writes it: raw, with a window of 4 KiB."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -12)
    return packer.compress(data) + packer.flush()


# -- images that the driver makes --------------------------------------------------------------------

#: Kind: options of create, whether it has a backing file, whether it has a snapshot.
KINDS: dict[str, tuple[dict[str, str], bool, bool]] = {
    "plain": ({}, False, False),
    "small clusters": ({"cluster_size": "512"}, False, False),
    "version 2": ({"compat": "0.10", "cluster_size": "4096"}, False, False),
    "overlay": ({"cluster_size": "4096"}, True, False),
    "overlay of version 2": ({"compat": "0.10", "cluster_size": "16384"}, True, False),
    "snapshot": ({"cluster_size": "4096"}, False, True),
    "snapshot of an overlay": ({"cluster_size": "65536"}, True, True),
    "refcounts of 1 bit": ({"refcount_bits": "1", "cluster_size": "1024"}, False, False),
    "refcounts of 2 bits": ({"refcount_bits": "2", "cluster_size": "4096"}, False, True),
    "refcounts of 64 bits": ({"refcount_bits": "64", "cluster_size": "512"}, True, False),
    "compressed": ({"cluster_size": "8192"}, False, False),
    "compressed overlay with a snapshot": ({"cluster_size": "4096"}, True, True),
    "preallocated": ({"preallocation": "metadata"}, False, False),
    "subclusters": ({"extended_l2": "on", "cluster_size": "16384"}, False, False),
    "subclusters over a parent": ({"extended_l2": "on", "cluster_size": "32768"}, True, False),
    "compressed subclusters with a snapshot": ({"extended_l2": "on", "cluster_size": "16384"}, True, True),
    "encrypted": ({"encrypt.iter-time": "1", "cluster_size": "4096"}, False, False),
    "encrypted overlay with a snapshot": ({"encrypt.iter-time": "1", "cluster_size": "65536"}, True, True),
    "lazy": ({"lazy_refcounts": "on", "cluster_size": "32768"}, False, False),
}


def created(size: int, options: dict[str, str] | None = None, backing: str | None = None) -> MemoryFile:
    """A new image."""
    file = MemoryFile()
    reference = None if backing is None else BackingReference(backing, "raw")
    request = CreateRequest(size, reference, options=options or {})
    if any(option.startswith("encrypt.") for option in request.options):
        from tapfs.kernel.cryptography import EngineCryptography  # no other image needs the engine

        request = replace(request, encrypted=True, password=b"secret", cryptography=EngineCryptography("image"))
    file.apply(FORMAT.create(request))
    return file


def opened(file: MemoryFile, backing: bytes = b"") -> ModelDisk:
    """The image, to be written."""
    return ModelDisk(cast("WritableDriver", FORMAT.open(file, OpenRequest(writable=True))), file, backing)


def make(kind: str, size: int, seed: int) -> tuple[MemoryFile, bytes]:
    """An image of a kind with some data in it, and the bytes of its backing disk."""
    options, has_backing, has_snapshot = KINDS[kind]
    choice = random.Random(seed)
    backing = choice.randbytes(size * 3 // 4) if has_backing else b""
    file = created(size, options, "/images/base.raw" if has_backing else None)
    disk = opened(file, backing)
    if "compressed" in kind:
        fill_compressed(disk, choice)
        disk = opened(file, backing)
    for number in range(4):
        at = choice.randrange(disk.driver.geometry.virtual_size - 9000)
        disk.write(at, choice.randbytes(9000))
        if number == 2 and has_snapshot:
            disk.flush()
            take_snapshot(file, "before")
            disk = opened(file, backing)
    disk.flush()
    return MemoryFile(bytes(file.data)), backing


def fill_compressed(disk: ModelDisk, choice: random.Random) -> None:
    """Put compressed and plain clusters into a new image as a stream."""
    writer = cast("Streamable", disk.driver).stream()
    granule = disk.driver.geometry.packed_unit
    for offset in range(0, disk.driver.geometry.virtual_size, granule * choice.choice([1, 3])):
        plain = choice.choice([choice.randbytes(granule), b"%016d" % offset * (granule // 16)])
        packed = deflated(plain)
        compressed = len(packed) < granule
        payload = packed if compressed else plain
        host_offset = writer.append(offset, len(payload), compressed=compressed)
        disk.file.do(Write(0, host_offset, payload))
    plan = writer.finish()
    disk.file.apply(plan)
    writer.drained(plan)


def take_snapshot(file: MemoryFile, name: str) -> None:
    """What `qemu-img snapshot -c` does, by hand, into an image without snapshots."""
    data = file.data
    fields = Fields(bytes(data))
    l1 = bytearray(data[fields.l1_at : fields.l1_at + 8 * fields.l1_entries])
    for at in range(0, len(l1), 8):
        entry = int.from_bytes(l1[at : at + 8], "big")
        table = entry & OFFSET_MASK
        if not table:
            continue
        _count_again(data, fields, table, fields.cluster)
        for word_at in range(table, table + fields.cluster, fields.entry):
            word = int.from_bytes(data[word_at : word_at + 8], "big")
            if word & COMPRESSED:
                _count_again(data, fields, *packed_range(fields, word))
            elif word & OFFSET_MASK:
                _count_again(data, fields, word & OFFSET_MASK, fields.cluster)
            data[word_at : word_at + 8] = (word & ~COPIED).to_bytes(8, "big")
        l1[at : at + 8] = (entry & ~COPIED).to_bytes(8, "big")
    data[fields.l1_at : fields.l1_at + len(l1)] = l1
    places: list[int] = []
    entry_bytes = struct.pack(">QIHHIIQIIQQ", 0, fields.l1_entries, 1, len(name), 7, 0, 0, 0, 16, 0, fields.size)
    for content in (l1, entry_bytes + b"1" + name.encode()):
        data.extend(bytes(-len(data) % fields.cluster))
        places.append(len(data))
        data.extend(content)
        data.extend(bytes(-len(data) % fields.cluster))
        _count_again(data, fields, places[-1], len(content))
    data[places[1] : places[1] + 8] = places[0].to_bytes(8, "big")
    struct.pack_into(">IQ", data, 60, 1, places[1])


def _count_again(data: bytearray, fields: Fields, start: int, length: int) -> None:
    """Raise the refcounts of a range by one; their blocks exist."""
    for cluster in range(start // fields.cluster, (start + length - 1) // fields.cluster + 1):
        per_block = fields.cluster * 8 // fields.refcount_bits
        index, inside = divmod(cluster, per_block)
        block = int.from_bytes(data[fields.reftable_at + 8 * index : fields.reftable_at + 8 * index + 8], "big")
        assert block, "the test needs a smaller image"
        if fields.refcount_bits >= 8:
            width = fields.refcount_bits // 8
            at = block + inside * width
            data[at : at + width] = (int.from_bytes(data[at : at + width], "big") + 1).to_bytes(width, "big")
        else:
            per_byte = 8 // fields.refcount_bits
            data[block + inside // per_byte] += 1 << inside % per_byte * fields.refcount_bits
