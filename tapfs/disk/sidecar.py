"""The sidecar of an image: a file with a hash tree over what a guest reads, and the stamps of the image's files.

docs/specs/sidecar.md is the specification, to the byte. A sidecar is written once and never changed.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

from tapfs.disk.blake3_digests import DIGEST_BYTES, blake3_digest, derived_digest
from tapfs.disk.hash_tree import BLOCK_BYTES, Level, TreeBuilder, TreeReader, levels_of
from tapfs.disk.stamps import Stamp
from tapfs.driver import MAX_DISK_BYTES
from tapfs.errors import ErrorKind, ImageError, from_os_error

if TYPE_CHECKING:
    from tapfs.disk.chain import Layer

#: A sidecar has the name of its image with this behind it.
SUFFIX = ".tapfs-hash"

MAGIC, VERSION = b"TAPFHASH", 1
#: Magic number, version, flags, bytes of the disk, bytes of a leaf, levels, leaves, root, stamps, offset of the tree.
_HEADER = struct.Struct("<8sIIQIIQ32sI4xQ8x")
_STAMP = struct.Struct(f"<Qq{DIGEST_BYTES}s")
_SUM_AT = _HEADER.size
_STAMPS_AT = _SUM_AT + DIGEST_BYTES
_ROOT_CONTEXT = "tapfs 2026 sidecar version 1 root"
_MOST_STAMPS = 4096

#: The sizes that a leaf may have are the powers of two between these.
LEAST_LEAF_BYTES, MOST_LEAF_BYTES = 4096, 1 << 20
USUAL_LEAF_BYTES = 64 << 10

_OP = "read the sidecar"


def usual_name(image: str, snapshot: str | None = None, disk: int | None = None) -> str:
    """The sidecar of an image, of a snapshot inside it, or of one disk of a package, where no other name is said."""
    part = "" if disk is None else f".disk{disk}"
    if snapshot is not None:
        part += f".snapshot-{snapshot.replace('%', '%25').replace('/', '%2F')}"
    return f"{image}{part}{SUFFIX}"


def usual_name_of(layer: Layer, path: str) -> str:
    """The same of an open image; `path` is where its file is, if it lies in no package."""
    package, disk = layer.packaged or (path, None)
    return usual_name(package, layer.snapshot, disk)


class Hashed(NamedTuple):
    """What was hashed: bytes of the disk and of a leaf, the root of the tree, and the stamps of the files."""

    disk_bytes: int
    leaf_bytes: int
    root: bytes
    stamps: list[Stamp]

    @property
    def leaves(self) -> int:
        """The leaves of the disk; the last one may be shorter than the others."""
        return -(-self.disk_bytes // self.leaf_bytes)


def root_of(disk_bytes: int, leaf_bytes: int, top: bytes) -> bytes:
    """The root of a tree: the digest of its shape and of the digest of its last block."""
    return derived_digest(_ROOT_CONTEXT, struct.pack("<QI", disk_bytes, leaf_bytes) + top)


class SidecarWriter:
    """Writes a sidecar. Digests of leaves come in their order; `write` takes an offset and bytes."""

    def __init__(
        self, disk_bytes: int, leaf_bytes: int, stamps: list[Stamp], write: Callable[[int, bytes], None]
    ) -> None:
        self._disk_bytes = disk_bytes
        self._leaf_bytes = leaf_bytes
        self._stamps = stamps
        self._write = write
        leaves = -(-disk_bytes // leaf_bytes)
        self._levels = levels_of(leaves, _tree_offset(len(stamps)))
        self._builder = TreeBuilder(self._levels, blake3_digest(), write)

    @property
    def size(self) -> int:
        """The bytes of the finished file."""
        return _end_of(self._levels)

    def put(self, leaf: int, digest: bytes) -> None:
        """Take the digest of a leaf."""
        self._builder.put(leaf, digest)

    def finish(self) -> Hashed:
        """Write the end of the tree and the header."""
        root = root_of(self._disk_bytes, self._leaf_bytes, self._builder.finish())
        hashed = Hashed(self._disk_bytes, self._leaf_bytes, root, self._stamps)
        header = _HEADER.pack(
            MAGIC,
            VERSION,
            0,
            hashed.disk_bytes,
            hashed.leaf_bytes,
            len(self._levels),
            hashed.leaves,
            root,
            len(self._stamps),
            self._levels[0].offset,
        )
        stamps = b"".join(_STAMP.pack(*stamp) for stamp in self._stamps)
        self._write(0, header + blake3_digest()(header + stamps) + stamps)
        return hashed


class Sidecar:
    """An open sidecar, for one thread at a time. Raises ImageError for what is no sidecar, or a damaged one.

    Of the tree only that is read, and proved up to the root, which is asked for.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            remedy = "make one with tapfs hash" if isinstance(error, FileNotFoundError) else None
            failure = from_os_error(error, path=path, op=_OP)
            failure.remedy = remedy
            raise failure from error
        except ValueError as error:
            raise ImageError(ErrorKind.NOT_FOUND, f"is no file name: {error}", path=repr(path), op=_OP) from error
        try:
            self.hashed, levels = self._read_header()
            self._tree = TreeReader(levels, blake3_digest(), self._read, self._proves_top, path)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def digest_of(self, leaf: int) -> bytes:
        """The digest of a leaf. Raises ImageError(corrupt) where the sidecar is damaged."""
        return self._tree.digest_of(leaf)

    def written_leaves(self, first: int, end: int) -> Iterator[int]:
        """The leaves from `first` to before `end` that are not zeros, ascending. Raises as `digest_of`."""
        return self._tree.written_leaves(first, end)

    def require_root(self, root: bytes) -> None:
        """Raise ImageError(corrupt) unless the sidecar has this root."""
        if root != self.hashed.root:
            raise ImageError(
                ErrorKind.CORRUPT,
                f"has the root {self.hashed.root.hex()}, not {root.hex()}: it is that of another disk",
                path=self.path,
                op=_OP,
            )

    def _proves_top(self, digest: bytes) -> bool:
        return root_of(self.hashed.disk_bytes, self.hashed.leaf_bytes, digest) == self.hashed.root

    def _read_header(self) -> tuple[Hashed, list[Level]]:
        raw = self._read(0, _STAMPS_AT)
        if raw[: len(MAGIC)] != MAGIC:
            raise ImageError(
                ErrorKind.INVALID_FORMAT, "is no sidecar that tapfs hash has written", path=self.path, offset=0, op=_OP
            )
        if len(raw) < _STAMPS_AT:
            raise self._fault("its header was cut", len(raw))
        _, version, flags, disk_bytes, leaf_bytes, level_count, leaves, root, count, start = _HEADER.unpack_from(raw)
        if version != VERSION or flags:
            raise ImageError(
                ErrorKind.UNSUPPORTED,
                f"is a sidecar of version {version} with the flags {flags:#x}; tapfs knows version {VERSION}",
                path=self.path,
                op=_OP,
            )
        stamps = self._read(_STAMPS_AT, min(count, _MOST_STAMPS) * _STAMP.size)
        if blake3_digest()(raw[:_SUM_AT] + stamps) != raw[_SUM_AT:]:
            raise self._fault("the digest of its header is wrong", _SUM_AT)
        # The digest is right, so what is impossible now was written so.
        possible = leaf_size_is_possible(leaf_bytes) and disk_bytes <= MAX_DISK_BYTES and start == _tree_offset(count)
        hashed = Hashed(disk_bytes, leaf_bytes, root, [Stamp(*each) for each in _STAMP.iter_unpack(stamps)])
        levels = levels_of(hashed.leaves, start) if possible else []
        if not possible or leaves != hashed.leaves or level_count != len(levels):
            raise self._fault("it describes an impossible tree", 0)
        if os.fstat(self._descriptor).st_size != _end_of(levels):
            raise self._fault(f"it has not the {_end_of(levels)} bytes of its tree", os.fstat(self._descriptor).st_size)
        return hashed, levels

    def _read(self, offset: int, length: int) -> bytes:
        try:
            return os.pread(self._descriptor, length, offset)
        except OSError as error:
            raise from_os_error(error, path=self.path, op=_OP, offset=offset) from error

    def _fault(self, message: str, offset: int) -> ImageError:
        return ImageError(
            ErrorKind.CORRUPT, f"the sidecar itself is damaged: {message}", path=self.path, offset=offset, op=_OP
        )


def leaf_size_is_possible(leaf_bytes: int) -> bool:
    """Whether a leaf may have so many bytes."""
    return LEAST_LEAF_BYTES <= leaf_bytes <= MOST_LEAF_BYTES and leaf_bytes & (leaf_bytes - 1) == 0


def _tree_offset(stamps: int) -> int:
    end = _STAMPS_AT + stamps * _STAMP.size
    return -(-end // BLOCK_BYTES) * BLOCK_BYTES


def _end_of(levels: list[Level]) -> int:
    return levels[-1].offset + levels[-1].blocks * BLOCK_BYTES
