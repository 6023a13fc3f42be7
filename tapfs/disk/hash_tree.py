"""A hash tree in a file: the digests of a disk's leaves, and above them the digests of blocks of digests.

docs/specs/sidecar.md is the specification. What is all zeros has 32 zero bytes for a digest, a leaf as well as a block
of digests. So the tree of a sparse disk is a sparse file, and neither making nor reading it touches what is empty.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tapfs.disk.blake3_digests import DIGEST_BYTES, Digest
from tapfs.errors import ErrorKind, ImageError

#: Bytes of a block of digests, and the digests in it.
BLOCK_BYTES = 4096
FAN_OUT = BLOCK_BYTES // DIGEST_BYTES
ZERO_DIGEST = bytes(DIGEST_BYTES)
ZERO_BLOCK = bytes(BLOCK_BYTES)

#: Blocks that a reader keeps when it has proved them: 4 MiB, so those above the leaves of a large disk stay.
_KEPT_BLOCKS = 1024


class Level(NamedTuple):
    """One level of a tree: where its first block lies in the file, and how many digests it has."""

    offset: int
    entries: int

    @property
    def blocks(self) -> int:
        """Its blocks; a level has one at least."""
        return max(1, -(-self.entries // FAN_OUT))


def levels_of(leaves: int, start: int) -> list[Level]:
    """The levels of a tree: first that of the leaves, at byte `start` of the file; the last one has one block."""
    levels = [Level(start, leaves)]
    while levels[-1].blocks > 1:
        below = levels[-1]
        levels.append(Level(below.offset + below.blocks * BLOCK_BYTES, below.blocks))
    return levels


class TreeBuilder:
    """Writes a tree from the digests of its leaves, which come in their order; those of zeros may be left out.

    `write` takes an offset in the file and a block. Of each level one block is held in memory.
    """

    def __init__(self, levels: list[Level], digest: Digest, write: Callable[[int, bytes], None]) -> None:
        self._levels = levels
        self._digest = digest
        self._write = write
        self._blocks = [bytearray(BLOCK_BYTES) for _ in levels]
        self._numbers = [0] * len(levels)

    def put(self, leaf: int, digest: bytes) -> None:
        """Take the digest of a leaf."""
        self._put(0, leaf, digest)

    def finish(self) -> bytes:
        """Write what is held; the digest of the only block of the last level."""
        for level in range(len(self._levels) - 1):
            self._end_block(level)
        top = bytes(self._blocks[-1])
        if top == ZERO_BLOCK:
            return ZERO_DIGEST
        self._write(self._levels[-1].offset, top)
        return self._digest(top)

    def _put(self, level: int, entry: int, digest: bytes) -> None:
        number, at = divmod(entry, FAN_OUT)
        if number != self._numbers[level]:
            self._end_block(level)
            self._numbers[level] = number
        self._blocks[level][at * DIGEST_BYTES : (at + 1) * DIGEST_BYTES] = digest

    def _end_block(self, level: int) -> None:
        block = bytes(self._blocks[level])
        if block == ZERO_BLOCK:
            return
        number = self._numbers[level]
        self._write(self._levels[level].offset + number * BLOCK_BYTES, block)
        self._blocks[level] = bytearray(BLOCK_BYTES)
        self._put(level + 1, number, self._digest(block))


class TreeReader:
    """Reads a tree, each block proved by the one above it, and the last one by `proves_top`. For one thread at a time.

    `read` gives bytes of the file from an offset on; `path` is its name for errors.
    """

    def __init__(
        self,
        levels: list[Level],
        digest: Digest,
        read: Callable[[int, int], bytes],
        proves_top: Callable[[bytes], bool],
        path: str,
    ) -> None:
        self._levels = levels
        self._digest = digest
        self._read = read
        self._proves_top = proves_top
        self._path = path
        self._kept: OrderedDict[tuple[int, int], bytes] = OrderedDict()

    def digest_of(self, leaf: int) -> bytes:
        """The digest of a leaf. Raises ImageError(corrupt) where the tree is damaged."""
        number, at = divmod(leaf, FAN_OUT)
        return _entry(self._block(0, number), at)

    def written_leaves(self, first: int, end: int) -> Iterator[int]:
        """The leaves from `first` to before `end` that are not zeros, ascending. Raises as `digest_of`."""
        yield from self._written(len(self._levels) - 1, 0, first, end)

    def _written(self, level: int, number: int, first: int, end: int) -> Iterator[int]:
        block = self._block(level, number)
        if block == ZERO_BLOCK:
            return
        span = FAN_OUT**level  # the leaves below one entry
        start = number * FAN_OUT
        low = max(0, first // span - start)
        high = min(FAN_OUT, -(-end // span) - start)
        for at in range(low, high):
            if _entry(block, at) == ZERO_DIGEST:
                continue
            if level == 0:
                yield start + at
            else:
                yield from self._written(level - 1, start + at, first, end)

    def _block(self, level: int, number: int) -> bytes:
        key = level, number
        kept = self._kept.get(key)
        if kept is not None:
            self._kept.move_to_end(key)
            return kept
        offset = self._levels[level].offset + number * BLOCK_BYTES
        block = self._read(offset, BLOCK_BYTES)
        digest = ZERO_DIGEST if block == ZERO_BLOCK else self._digest(block)
        if level + 1 == len(self._levels):
            proved = self._proves_top(digest)
        else:
            above, at = divmod(number, FAN_OUT)
            proved = digest == _entry(self._block(level + 1, above), at)
        if not proved or len(block) != BLOCK_BYTES:
            raise ImageError(
                ErrorKind.CORRUPT,
                "the sidecar itself is damaged: a block of digests is not the one that was written",
                path=self._path,
                offset=offset,
                op="read the sidecar",
                remedy="make it anew of an image that you trust, with {force}",
            )
        self._kept[key] = block
        if len(self._kept) > _KEPT_BLOCKS:
            self._kept.popitem(last=False)
        return block


def _entry(block: bytes, at: int) -> bytes:
    return block[at * DIGEST_BYTES : (at + 1) * DIGEST_BYTES]
