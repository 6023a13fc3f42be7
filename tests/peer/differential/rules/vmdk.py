"""Known disagreements about VMDKs."""

from __future__ import annotations

import re

from tests.peer.differential.rules.block_facts import vmdk_is_packed
from tests.peer.differential.rules.rule import Right, Rule, of_the_file
from tests.peer.differential.run import SECTOR, Difference, Sort
from tests.peer.qcow2_damage.sound import IMAGE

_VMDK = ("vmdk",)
_READ, _REFUSED, _QEMU_REFUSES = (Sort.TAPFS_CANNOT_READ,), (Sort.TAPFS_REFUSES,), (Sort.QEMU_REFUSES,)


_EMPTY_LINE = re.compile(rb"\n\s*\n(RW|RDONLY|NOACCESS) ")
#: Lines of extents, and those of them that QEMU scans.
_LINE = re.compile(rb"^\s*(rw|rdonly|noaccess)\s.*$", re.IGNORECASE | re.MULTILINE)
_SCANNED = re.compile(rb'RW \d+ (FLAT|SPARSE|VMFS|VMFSSPARSE|SESPARSE) "[^"]+"( \d+)?\s*')
_CAPACITY = re.compile(rb'^\s*RW\s+(\d+)\s+(?:SPARSE|VMFSSPARSE|SESPARSE)\s+"?([^"\s]+)', re.MULTILINE)


def _is_embedded(difference: Difference) -> bool:
    return difference.files[IMAGE].startswith(b"KDMV")


def _capacity(content: bytes) -> int:
    """The sectors that the header of an extent says."""
    at, width = (16, 8) if content.startswith(b"\xbe\xba\xfe\xca") else (12, 4 if content.startswith(b"COWD") else 8)
    return int.from_bytes(content[at : at + width], "little")


def _counts_twice(difference: Difference) -> bool:
    """Whether an empty line stands before an extent's line."""
    return _EMPTY_LINE.search(difference.files[IMAGE]) is not None


def _drops(difference: Difference) -> bool:
    """Whether an extent is one that QEMU drops."""
    return any(not _SCANNED.fullmatch(line[0]) for line in _LINE.finditer(difference.files[IMAGE]))


def _has_another_capacity(difference: Difference) -> bool:
    """Whether the header of a sparse extent says another capacity than the line of a list."""
    return any(
        int(line[1]) != _capacity(content)
        for line in _CAPACITY.finditer(difference.files[IMAGE][:4096])
        for file, content in difference.files.items()
        if file.encode() == line[2]
    )


def _twin(difference: Difference) -> bool:
    """Whether tapfs shows what the redundant table of an extent leads to, and that is not what the primary one does."""
    sparse = [content for content in difference.files.values() if content.startswith(b"KDMV")]
    bases = {0, *(SECTOR * int.from_bytes(content[12:20], "little") for content in sparse)}
    return any(
        _by_table(content, difference.place - base, 48)
        == difference.ours
        != _by_table(content, difference.place - base, 56)
        for content in sparse
        for base in bases
        if difference.place >= base
    )


def _by_table(content: bytes, place: int, field: int) -> bytes | None:
    """A sector of an extent by the directory that a field of its header leads to; None where it leads nowhere."""
    grain = int.from_bytes(content[20:28], "little") * SECTOR
    entries = int.from_bytes(content[44:48], "little")
    at = SECTOR * int.from_bytes(content[field : field + 8], "little")
    if not (grain and entries and at):
        return None
    number, inside = divmod(place, grain)
    table = SECTOR * int.from_bytes(content[at + 4 * (number // entries) :][:4], "little")
    found = int.from_bytes(content[table + 4 * (number % entries) :][:4], "little") if table else 0
    return content[found * SECTOR + inside :][:SECTOR].ljust(SECTOR, b"\0") if found else bytes(SECTOR)


RULES = (
    Rule(
        _VMDK,
        _READ,
        "past the end of the file",
        "An entry that leads past the end of the file, a table or a grain",
        "says so",
        "shows zeros",
        Right.TAPFS,
        "what the entry stands for is lost",
        of_the_file,
    ),
    Rule(
        _VMDK,
        _READ,
        "the file was cut",
        "A file that ends before what the disk has of a grain",
        "says so, for the whole grain",
        "shows what is left, then zeros",
        Right.TAPFS,
        "no zeros were ever there",
        of_the_file,
    ),
    Rule(
        _VMDK,
        _READ,
        "inside the (header|grain directory|metadata)|no grain|no table|outside the area|of the redundant directory|"
        "entry 1 |zeroed",
        "An entry that leads into the header or into tables, or that is none; a blank directory beside a good one",
        "says so",
        "shows metadata or zeros",
        Right.TAPFS,
        "that is not what the guest wrote",
        of_the_file,
    ),
    Rule(
        _VMDK,
        _REFUSED,
        "line ends in the header",
        "Changed line ends in the header",
        "refuses: the file went through a transfer as text",
        "reads on",
        Right.TAPFS,
        "VirtualBox and libvmdk refuse, too: each line end in the data is changed as well",
    ),
    Rule(
        _VMDK,
        _REFUSED,
        "compression .*only|grains are packed|of packed grains|a power of two|VMDK version|COWD version|"
        "the extent has .* bytes|lies past the end|behind the end of any file|grains begin before|"
        "lies at .* bytes long|directory has|lies inside the|capacity of|needs? |footer",
        "A header that cannot be true: versions, lengths, places, a footer that says otherwise",
        "refuses",
        "looks at what it needs only",
        Right.TAPFS,
        "nobody can say where its tables are",
    ),
    Rule(
        _VMDK,
        _REFUSED,
        "descriptor|is missing|unknown type|without a file|truncated|twice|has no descriptor|CID|cid",
        "A descriptor with lines that cannot be understood, keys that mean nothing, a missing or short file",
        "refuses",
        "passes such lines over, and shows zeros for a short file",
        Right.TAPFS,
        "an extent that is passed over moves the rest of the disk",
    ),
    Rule(
        _VMDK,
        (Sort.SIZE,),
        "",
        "A header whose capacity is another than that of the descriptor's line",
        "the line's",
        "the header's, of an embedded descriptor",
        Right.TAPFS,
        'the line is exact (see "Sparse extent header (KDMV), 512 bytes")',
        _is_embedded,
    ),
    Rule(
        _VMDK,
        (Sort.SIZE, Sort.BYTES, Sort.QEMU_CANNOT_READ),
        "",
        "A list whose line says another capacity than the header of the extent's file",
        "the line's",
        "the header's, and all behind it has moved",
        Right.TAPFS,
        'the line is exact (see "Sparse extent header (KDMV), 512 bytes")',
        _has_another_capacity,
    ),
    Rule(
        _VMDK,
        (Sort.SIZE, Sort.BYTES, Sort.QEMU_CANNOT_READ),
        "",
        "An empty line right before the line of an extent",
        "an empty line",
        "counts the extent twice, and all behind it has moved",
        Right.TAPFS,
        "nothing in the text says so",
        _counts_twice,
    ),
    Rule(
        _VMDK,
        (Sort.SIZE, Sort.BYTES, Sort.QEMU_CANNOT_READ),
        "",
        "Extents that are RDONLY, NOACCESS or ZERO, in small letters, or without quotes",
        "each as it is meant",
        "drops them, and all behind has moved",
        Right.TAPFS,
        "no byte may appear at another place",
        _drops,
    ),
    Rule(
        _VMDK,
        _QEMU_REFUSES,
        "File truncated",
        "An overhead that ends past the end of the file",
        "reads: the tables say where grains are",
        "refuses",
        Right.EITHER,
        "nothing is placed by that field",
    ),
    Rule(
        _VMDK,
        _QEMU_REFUSES,
        "[Uu]nsupported|[Ii]nvalid extent line|invalid VMDK image descriptor|Could not open|Invalid footer|too big|"
        "too large|L1|L2|granularity|parent|CID",
        "Types of descriptors that QEMU does not list, sectors behind the end marker, reserved fields of seSparse",
        "goes by the extents",
        "refuses",
        Right.EITHER,
        'see "Descriptor": the type says nothing that the extents do not',
    ),
    Rule(
        _VMDK,
        (Sort.QEMU_CANNOT_READ,),
        "",
        "Grains whose marker, or whose length, says otherwise than the flags of the header",
        "reads what the table leads to",
        "an error",
        Right.EITHER,
        "the flags are wrong, or the grains are",
        vmdk_is_packed,
    ),
    Rule(
        _VMDK,
        (Sort.BYTES, Sort.QEMU_CANNOT_READ),
        "",
        "An entry or a table that cannot be true, whose redundant twin can",
        "reads by the twin",
        "shows zeros or metadata",
        Right.TAPFS,
        "that is what the twin is for",
        _twin,
    ),
)
