"""Small qcow2 images in files, for the published cases: made, written, looked at, and proven clean."""

from __future__ import annotations

from pathlib import Path

import tapfs
from tests.qcow2_images import COPIED, Fields, audit

CLUSTER = 4096


def new(path: Path, size: int, backing: Path | None = None, **options: str) -> Path:
    """A new image; clusters of 4 KiB unless the options say otherwise."""
    parent, its_format = (None, None) if backing is None else (str(backing), format_of(backing))
    wanted = {"cluster_size": str(CLUSTER)} | options
    tapfs.create(path, "qcow2", size, backing=parent, backing_format=its_format, options=wanted)
    return path


def format_of(path: Path) -> str:
    """Formats by the first bytes: qcow2, or else raw."""
    return "qcow2" if path.read_bytes()[:4] == b"QFI\xfb" else "raw"


def raw(path: Path, byte: int, size: int) -> Path:
    """A raw image of one byte again and again."""
    path.write_bytes(bytes([byte]) * size)
    return path


def put(path: Path, *pieces: tuple[int, int, int]) -> None:
    """Write pieces ``(byte, offset, length)`` by tapfs."""
    with tapfs.open(path, writable=True) as disk:
        for byte, offset, length in pieces:
            disk.write(offset, bytes([byte]) * length)


def require(path: Path, *pieces: tuple[int, int, int]) -> None:
    """Each piece ``(byte, offset, length)`` of the disk holds that byte only."""
    with tapfs.open(path) as disk:
        for byte, offset, length in pieces:
            assert disk.read(offset, length) == bytes([byte]) * length, f"[{offset:#x}, +{length:#x})"


def clean(path: Path) -> None:
    """Neither tapfs nor the second checker finds a corruption or a leak."""
    report = tapfs.check(path)
    assert (report.corruptions, report.leaks) == (0, 0), report.findings
    found = audit(path.read_bytes())
    assert (found.corruptions, found.leaks) == ([], [])


def poke(path: Path, at: int, number: int, width: int = 8) -> None:
    """Change one field of a file."""
    with path.open("r+b") as file:
        file.seek(at)
        file.write(number.to_bytes(width, "big"))


def peek(path: Path, at: int, width: int = 8) -> int:
    """One field of a file."""
    return Fields(path.read_bytes()).number(at, width)


def table_at(path: Path, index: int = 0) -> int:
    """Where the L2 table is that an L1 entry names; 0 if it names none."""
    fields = Fields(path.read_bytes())
    return fields.number(fields.l1_at + 8 * index, 8) & ~COPIED


def entry_at(path: Path, cluster: int) -> int:
    """Where the L2 entry of a cluster of the disk is."""
    fields = Fields(path.read_bytes())
    return table_at(path, cluster // fields.per_table) + cluster % fields.per_table * fields.entry


def refcount_at(path: Path, place: int) -> int:
    """Where the refcount of 16 bits of the host cluster at a place is, in the first refcount block."""
    fields = Fields(path.read_bytes())
    return fields.number(fields.reftable_at, 8) + 2 * (place // fields.cluster)
