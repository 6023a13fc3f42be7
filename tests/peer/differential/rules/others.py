"""Known disagreements about QED, DMG and LUKS."""

from __future__ import annotations

from tests.peer.differential.rules.rule import Right, Rule, of_the_file
from tests.peer.differential.run import SECTOR, Difference, Sort
from tests.peer.qcow2_damage.sound import IMAGE

_QED, _DMG, _LUKS = ("qed",), ("dmg",), ("luks",)
_READ, _REFUSED = (Sort.TAPFS_CANNOT_READ,), (Sort.TAPFS_REFUSES,)
_QEMU_REFUSES = (Sort.QEMU_REFUSES,)


def _cut_in_a_sector(difference: Difference) -> bool:
    return len(difference.files[IMAGE]) % SECTOR != 0


def _is_short_and_plain(difference: Difference) -> bool:
    """Whether tapfs shows zeros in an image whose blocks are plain."""
    return difference.seed.kind.startswith("raw") and not any(difference.ours)


RULES = (
    # -- QED --------------------------------------------------------------------------------------
    Rule(
        _QED,
        _QEMU_REFUSES,
        "table offset is invalid|Could not open|backing filename offset is invalid|[Ii]mage|[Tt]able|header",
        "A first-level table that the end of the file cuts behind the disk's last entry, a header of no clusters",
        "reads what is there",
        "refuses the image",
        Right.EITHER,
        "the entries that the disk needs are in the file",
    ),
    Rule(
        _QED,
        _REFUSED,
        "the name of the parent has|is not aligned, or not in the file|image_size is|must be",
        "A parent without a name, a size or a table that cannot be",
        "refuses",
        "takes it for an image without a parent",
        Right.TAPFS,
        "the bit says that there is one, and zeros in its place are wrong",
    ),
    Rule(
        _QED,
        _READ,
        "inside the header or the L1 table|the file was cut|past the end of the file|not aligned",
        "Entries into the header or the first table, or to what the end of the file cuts",
        "says so",
        "shows metadata, or zeros",
        Right.TAPFS,
        "that is not what the guest wrote",
        of_the_file,
    ),
    Rule(
        _QED,
        (Sort.QEMU_CANNOT_READ,),
        "",
        "Places that the file does not have",
        "reads what the disk has of them",
        "an error",
        Right.EITHER,
        "the rest of the cluster is behind the end of the disk",
    ),
    # -- DMG --------------------------------------------------------------------------------------
    Rule(
        _DMG,
        (Sort.QEMU_CANNOT_READ,),
        "",
        "Sectors that no block has, tables that do not come in the order of the disk",
        "zeros; sorts the tables",
        "an error",
        Right.EITHER,
        "hdiutil leaves out what is free",
    ),
    Rule(
        _DMG,
        (Sort.SIZE,),
        "",
        "A trailer with another number of sectors than the tables have",
        "the larger one",
        "the trailer's",
        Right.EITHER,
        "nothing that the tables have is hidden",
    ),
    Rule(
        _DMG,
        (Sort.BYTES,),
        "",
        "A plain block with fewer sectors of bytes than it has sectors",
        "zeros behind its bytes",
        "what its memory had before",
        Right.TAPFS,
        'see "Tables of blocks"',
        _is_short_and_plain,
    ),
    Rule(
        _DMG,
        _QEMU_REFUSES,
        "Could not open|UDIF trailer|[Ss]ector|chunk|length",
        "Fields of a fork that is not used, bytes behind the trailer, blocks without sectors",
        "reads it",
        "refuses",
        Right.EITHER,
        "nothing of the disk depends on them",
    ),
    Rule(
        _DMG,
        _REFUSED,
        "of the unknown kind|trailers of version|two blocks have|its last sector is no trailer|one of .* segments|"
        "lies outside the file|property list|data fork|a table of .* blocks has|ends at sector|plain bytes|"
        "is too large|says that it is the end|no end among them|several codecs|"
        "cannot be unpacked|packed by|resource fork|table of blocks|no tables?",
        "A trailer, a property list or blocks that cannot be true; one of several segments",
        "refuses",
        "leaves out what it does not understand, and takes the first of two blocks",
        Right.TAPFS,
        "what is left out would read as zeros or as another's bytes",
    ),
    Rule(
        _DMG,
        _READ,
        "",
        "A payload that is damaged, or that unpacks to fewer bytes",
        "says so",
        "shows what came out, or zeros",
        Right.TAPFS,
        "each block must fill its sectors",
    ),
    # -- LUKS -------------------------------------------------------------------------------------
    Rule(
        _LUKS,
        _QEMU_REFUSES,
        r"stripes|overlapping|iteration count is zero",
        "A key slot, though it is not in use, with another number of stripes, or over another or the payload",
        "tries the other slots",
        "refuses the container",
        Right.EITHER,
        "the key that another slot has opens the payload",
    ),
    Rule(
        _LUKS,
        _QEMU_REFUSES,
        "Invalid argument|not supported|Unsupported|unexpected|too (small|large|big)|Could not|invalid|Invalid",
        "A name of a cipher, a mode or a digest with bytes behind its NUL, lengths that QEMU does not write",
        "reads it",
        "refuses",
        Right.EITHER,
        "a name ends with its first NUL",
    ),
    Rule(
        _LUKS,
        _REFUSED,
        "",
        "A header that is damaged where QEMU does not look",
        "refuses",
        "reads it",
        Right.TAPFS,
        "the specification says what the field may hold",
    ),
    Rule(
        _LUKS,
        (Sort.SIZE, *_READ),
        "",
        "A file that ends inside a sector",
        "the whole sectors",
        "one more, whose bytes in the file it completes with zeros and decrypts",
        Right.TAPFS,
        "a part of a sector cannot be decrypted",
        _cut_in_a_sector,
    ),
)
