"""Known disagreements about formats with one table of blocks: VHD, VHDX, VDI, Parallels."""

from __future__ import annotations

import re

from tests.peer.differential.rules.block_facts import (
    vhd_block_cut,
    vhd_start_changed,
    vhdx_entry_of_another_length,
    vhdx_structure_changed,
)
from tests.peer.differential.rules.rule import Right, Rule, of_the_file, zeros
from tests.peer.differential.run import SECTOR, Difference, Sort
from tests.peer.qcow2_damage.sound import IMAGE

_VHD, _VHDX, _VDI, _PARALLELS = ("vhd",), ("vhdx",), ("vdi",), ("parallels",)
_LOGGED = re.compile(rb"loge")
_READ, _REFUSED = (Sort.TAPFS_CANNOT_READ,), (Sort.TAPFS_REFUSES,)
_BOTH = (*_READ, *_REFUSED)


def _bitmap_hides(difference: Difference) -> bool:
    """Whether tapfs shows zeros where QEMU shows bytes of the file: the bit of the sector is 0."""
    return not any(difference.ours) and of_the_file(difference)


def _is_behind_a_header(difference: Difference) -> bool:
    """Whether a VDI has bytes before each block."""
    return any(difference.files[IMAGE][380:384])


def _ends_in_a_sector(difference: Difference) -> bool:
    return difference.size % SECTOR != 0


def _by_geometry(difference: Difference) -> bool:
    """Whether QEMU is older than 10, which takes the geometry of most creators, or takes one of no sectors."""
    return difference.qemu < 10 or difference.said.endswith(" 0 for QEMU")


def _is_hidden(difference: Difference) -> bool:
    """Whether a QEMU since 8 shows zeros for bytes of the file."""
    return difference.qemu >= 8 and zeros(difference) and any(difference.ours)


def _has_wrong_tail(difference: Difference) -> bool:
    """Whether an entry of a VHDX's log names a tail where no entry can begin."""
    ring = difference.files[IMAGE][1 << 20 : 2 << 20]
    tails = [
        int.from_bytes(ring[found.start() + 12 : found.start() + 16], "little") for found in _LOGGED.finditer(ring)
    ]
    return difference.seed.logged and any(tail % 4096 or tail >= 1 << 20 for tail in tails)


RULES = (
    Rule(
        ("vdi", "parallels"),
        _READ,
        "block at .* past the end of the file",
        "An entry that leads past the end of the file",
        "says so",
        "shows zeros",
        Right.TAPFS,
        "what the entry stands for is lost",
        zeros,
    ),
    Rule(
        ("vdi", "parallels", "vhd", "vhdx"),
        _READ,
        "the file was cut|the end of the file cuts|ends inside|guest data behind the end of the file",
        "A file that ends before what the disk has of a block",
        "says so, for the whole block",
        "shows what is left, then zeros",
        Right.TAPFS,
        "no zeros were ever there",
        of_the_file,
    ),
    Rule(
        ("vdi", "parallels", "vhd", "vhdx"),
        _READ,
        "inside the metadata|over the (copy|dynamic|block|batmap|footer)|inside the header",
        "An entry that leads into the header or the table",
        "says so",
        "shows these as the guest's bytes",
        Right.TAPFS,
        "no block can lie there",
        of_the_file,
    ),
    # -- VDI --------------------------------------------------------------------------------------
    Rule(
        _VDI,
        (Sort.QEMU_REFUSES,),
        "non-NULL (parent|link) UUID",
        "A base image with a link or with the change of a parent",
        "reads it: the type decides",
        "refuses",
        Right.EITHER,
        "VirtualBox goes by the type; `tapfs check` notes the link",
    ),
    Rule(
        _VDI,
        (Sort.QEMU_REFUSES,),
        "unaligned (data|block map) offset|block size .* is not",
        "A map or data that begin inside a sector, other sizes of blocks",
        "reads them",
        "refuses",
        Right.EITHER,
        "VirtualBox has no such rule",
    ),
    Rule(
        _VDI,
        _REFUSED,
        r"the file ends inside the header|the header has .* bytes, and the map begins|the map \[.* lies in the data",
        "A map over the header or over the data",
        "refuses",
        "reads both",
        Right.TAPFS,
        "one of the two is not what it is taken for",
    ),
    Rule(
        _VDI,
        _REFUSED,
        "the type .* of VDI images is not known|is a differencing image that names no parent",
        "A type that nobody knows, or type 4 without a link",
        "refuses",
        "reads it as a base",
        Right.TAPFS,
        "what lies below it is unknown",
    ),
    Rule(
        _VDI,
        _REFUSED,
        "bytes before each block are not possible|the disk has no bytes",
        "Block extra of odd lengths, a disk of no bytes",
        "refuses",
        "ignores it",
        Right.TAPFS,
        "places of blocks follow from block extra",
    ),
    Rule(
        _VDI,
        (Sort.BYTES,),
        "",
        "Block extra",
        "leaves it out",
        "shows it as data",
        Right.TAPFS,
        "VirtualBox computes places so",
        _is_behind_a_header,
    ),
    Rule(
        ("vdi", "vhd", "qcow", "qcow2", "luks"),
        (Sort.SIZE,),
        "",
        "A size that is no multiple of 512",
        "shows every byte",
        "rounds, up or down by format and version",
        Right.EITHER,
        "the disk has no sector of that length",
        _ends_in_a_sector,
    ),
    # -- Parallels --------------------------------------------------------------------------------
    Rule(
        _PARALLELS,
        (Sort.QEMU_REFUSES,),
        "Format Extension|Too big offset",
        "A format extension that cannot be",
        "reads the disk, and a check finds it",
        "refuses",
        Right.EITHER,
        "bitmaps say nothing about the disk",
    ),
    Rule(
        _PARALLELS,
        (Sort.QEMU_REFUSES,),
        "Catalog too large|Could not open",
        "More entries than a table has, or than the file",
        "reads those that the disk needs",
        "refuses some",
        Right.EITHER,
        "the rest stands for nothing",
    ),
    Rule(
        _PARALLELS,
        (Sort.BYTES,),
        "",
        "A table that goes on into the data, or a cluster that the end of the file cuts behind the end of the disk",
        "shows the data that the entries name",
        "8 and newer: zeros; before: the data",
        Right.TAPFS,
        "the file has all that the disk has of it",
        _is_hidden,
    ),
    Rule(
        _PARALLELS,
        _REFUSED,
        "clusters, the table has|inside the table|reaches past the end",
        "A table that has fewer entries than the disk needs, or that the data or the end of the file cuts",
        "refuses",
        "shows zeros for what has no entry",
        Right.TAPFS,
        "no writer leaves out entries",
    ),
    Rule(
        _PARALLELS,
        (Sort.QEMU_ENDS,),
        "parallels_read_format_extension",
        "A format extension at 2^63 or behind that",
        "reads the disk, and a check finds it",
        "7.2 to 11.1: an assertion ends the process",
        Right.TAPFS,
        "no field of an image may end who reads it",
    ),
    # -- VHD --------------------------------------------------------------------------------------
    Rule(
        _VHD,
        (Sort.QEMU_REFUSES,),
        "free_data_block_offset points after the end of file",
        "A block that ends past the end of the file",
        "reads the others",
        "refuses the image",
        Right.EITHER,
        "one block is lost, and not the disk",
    ),
    Rule(
        _VHD,
        (Sort.QEMU_REFUSES,),
        "Incorrect header checksum|invalid VPC image",
        "One of the two footers has a wrong checksum, or is not there",
        "reads by the other one",
        "reads the first only, of a fixed disk the last",
        Right.TAPFS,
        "that is what the copy is for",
    ),
    Rule(
        _VHD,
        (Sort.QEMU_REFUSES,),
        "Could not open|[Ii]nvalid (block|max)|too (small|large|big|many)",
        "A table or blocks that the copy at the start describes otherwise",
        "reads by the good one",
        "reads the first only",
        Right.TAPFS,
        "that is what the copy is for",
        vhd_start_changed,
    ),
    Rule(
        _VHD,
        _READ,
        "past the end of the file",
        "A block that ends past the end of the file, which the end of the disk does not cut",
        "says so, for the whole block",
        "shows what is left, then zeros",
        Right.TAPFS,
        "no zeros were ever there",
        vhd_block_cut,
    ),
    Rule(
        _VHD,
        _REFUSED,
        "no footer|describe two disks|its copy at the start that it grows|bytes stand before the footer|"
        "only .* stand before the footer|has .* blocks, the block",
        "Footers that describe two disks, or a disk that the file is too short for",
        "refuses",
        "takes the first, and shows zeros behind the end",
        Right.TAPFS,
        "nobody can say which disk was meant, and no zeros were there",
    ),
    Rule(
        _VHD,
        _REFUSED,
        "the type of the disk is|a differencing image",
        "A type of disk that is reserved, or type 4 without a parent's name",
        "refuses",
        "reads whatever is not fixed as dynamic",
        Right.TAPFS,
        "a differencing disk without its parent is none",
    ),
    Rule(
        _VHD,
        (Sort.BYTES,),
        "",
        "A sector whose bit is 0",
        "shows zeros",
        "ignores the bitmap",
        Right.TAPFS,
        'the document calls the sector not allocated (see "The sector bitmap")',
        _bitmap_hides,
    ),
    Rule(
        _VHD,
        (Sort.SIZE,),
        "",
        "Two sizes in the footer",
        "as QEMU 10",
        "7.2 takes the geometry of most creators, and every version one of no sectors",
        Right.TAPFS,
        'see "Which size is the disk\'s"',
        _by_geometry,
    ),
    # -- VHDX -------------------------------------------------------------------------------------
    Rule(
        _VHDX,
        _REFUSED,
        "lies past the end of the file|where none can be|the metadata have no|bytes, not [48]|bytes, not 16|"
        "physical sectors of|disk size|no multiple of 1 MiB|where no log can be|sequence number|VHDX version|"
        "reserved|overlap",
        "Regions, items or a log that cannot be, items that are required and missing",
        "refuses",
        "looks at what it needs only",
        Right.TAPFS,
        "the specification requires them",
    ),
    Rule(
        _VHDX,
        _REFUSED,
        "the log waits to be replayed",
        "A log that waits, and has no whole entry",
        "refuses",
        "takes it for empty",
        Right.TAPFS,
        "what was logged is lost, so the tables may be old",
    ),
    Rule(
        _VHDX,
        (Sort.BYTES,),
        "",
        "An entry of the log whose tail is beside a sector of the ring, or outside it",
        "leaves the entry out",
        "replays it",
        Right.TAPFS,
        "the specification calls such an entry not valid",
        _has_wrong_tail,
    ),
    Rule(
        _VHDX,
        (Sort.BYTES,),
        "",
        "An entry of the log with more sectors than its descriptors and their pages take",
        "leaves the entry out",
        "replays it",
        Right.EITHER,
        "the specification gives an entry no other sectors, and does not say that they are wrong",
        vhdx_entry_of_another_length,
    ),
    Rule(
        _VHDX,
        _READ,
        "reserved bits are set|state .* is unknown|reserved",
        "An entry with reserved bits, or in a state that there is not",
        "says so",
        "reads it as something else",
        Right.TAPFS,
        "nobody knows what was meant",
        of_the_file,
    ),
    Rule(
        _VHDX,
        (Sort.QEMU_REFUSES,),
        "Could not open|log|[Uu]nsupported|invalid|VHDX",
        "The first region table is damaged, or blocks lie over each other or past the end",
        "reads by the second table, and the other blocks",
        "refuses the image",
        Right.TAPFS,
        "that is what the copy is for; one block is lost, and not the disk",
        vhdx_structure_changed,
    ),
)
