"""Tell whether the log of an XFS holds changes to replay ("XFS Algorithms & Data Structures", "Journaling Log").

The log is a ring of basic blocks of 512 bytes. Each block starts with the number of its cycle, the count of
turns around the ring. The first block of a record starts with a magic number, and its cycle follows. An
unmount writes a record with one operation that says so. The log is clean if this is the last record.

Freezing a file system, as snapshots do, writes everything to its place and then records with the superblock
alone. Nothing is lost if these are not replayed.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from tapfs.partitions.reader import Reader

_BLOCK = 512
_RECORD_MAGIC = 0xFEEDBABE

#: Magic number, cycle, version and length of the data in bytes, own place and that of the oldest record
#: that is still needed, then after checksum and link the number of operations.
_RECORD = struct.Struct(">IIIIQQ8xI")
#: The byte order of the writing machine in the data, and the size of its buffers.
_BYTE_ORDER_AT, _BUFFER_SIZE_AT = 300, 320
_LITTLE_ENDIAN = 1
#: A header has room for the cycles of so much data; a record of a larger buffer has more headers.
_BYTES_A_HEADER = 32 << 10
#: A freeze leaves this many records at most that are not yet followed by an unmount.
_MAX_FREEZE_RECORDS = 8
#: The largest record: 256 KiB of data and their headers, in blocks.
_MAX_BLOCKS = (256 << 10) // _BLOCK + 8

#: The header of an operation: length of what follows it, its flags.
_OPERATION = struct.Struct(">4xIxB2x")
_UNMOUNT = 0x20
#: The first words of a transaction: "TRAN", type and number of it, number of regions; a buffer takes two of these.
_TRANSACTION_MAGIC, _TRANSACTION_BYTES, _REGIONS_OF_A_BUFFER = 0x5452414E, 16, 2
#: The first words of an item that is a buffer: type, regions, flags, length; then its place on the disk.
_BUFFER_TYPE, _BUFFER_BYTES = 0x123C, 16
#: A transaction of one buffer: start, header, the item's two regions, commit.
_OPERATIONS_OF_A_BUFFER = 5


def xfs_log_is_dirty(disk: Reader) -> bool:
    """Whether the last record of the log leaves something to replay; False if the log is on another device."""
    log = _Log.of(disk)
    if log is None or log.blocks == 0:
        return False
    head = log.head()
    if head == 0 and log.cycle(0) == 0:
        return False  # nothing was ever written
    last = log.record_before(head)
    return last is None or not (last.is_unmount or log.holds_superblock_alone(last, head))


class _Log:
    """The ring; blocks are counted from its start."""

    def __init__(self, disk: Reader, start: int, blocks: int) -> None:
        self._disk = disk
        self._start = start
        self.blocks = blocks

    @classmethod
    def of(cls, disk: Reader) -> _Log | None:
        """The log that the superblock names; None if it is on another device."""
        superblock = disk.read(0, 264)
        if len(superblock) < 264:
            return None
        (block_size,) = struct.unpack_from(">I", superblock, 4)
        (start,) = struct.unpack_from(">Q", superblock, 48)
        group_blocks, _, _, log_blocks = struct.unpack_from(">IIII", superblock, 84)
        group_shift = superblock[124]
        if start == 0 or group_shift > 32:
            return None
        # A block number has the allocation group above the block in that group.
        first = (start >> group_shift) * group_blocks + (start & ((1 << group_shift) - 1))
        return cls(disk, first * block_size, log_blocks * block_size // _BLOCK)

    def block(self, number: int) -> bytes:
        """One basic block."""
        return self._disk.read(self._start + number * _BLOCK, _BLOCK)

    def cycle(self, number: int) -> int:
        """The cycle in which a block was written; 0 if never."""
        block = self.block(number)
        first = int.from_bytes(block[:4], "big")
        return int.from_bytes(block[4:8], "big") if first == _RECORD_MAGIC else first

    def head(self) -> int:
        """The block that will be written next: where the cycle of the first block ends."""
        cycle = self.cycle(0)
        if self.cycle(self.blocks - 1) == cycle:
            return 0
        below, above = 0, self.blocks - 1  # written in this cycle, and not
        while above - below > 1:
            middle = (below + above) // 2
            if self.cycle(middle) == cycle:
                below = middle
            else:
                above = middle
        return above

    def record_before(self, end: int) -> _Record | None:
        """The record that ends where block `end` starts."""
        for back in range(1, min(_MAX_BLOCKS, self.blocks) + 1):
            start = (end - back) % self.blocks
            if int.from_bytes(self.block(start)[:4], "big") == _RECORD_MAGIC:
                record = self.record(start)
                return record if record is not None and record.length == back else None
        return None

    def record(self, start: int) -> _Record | None:
        """The record whose first block is `start`."""
        header = self.block(start)
        if len(header) < _BLOCK:
            return None
        magic, _, version, data_bytes, _, oldest, operations = _RECORD.unpack_from(header)
        (buffer_size,) = struct.unpack_from(">I", header, _BUFFER_SIZE_AT)
        (byte_order,) = struct.unpack_from(">I", header, _BYTE_ORDER_AT)
        headers = -(-buffer_size // _BYTES_A_HEADER) if version & 2 and buffer_size > _BYTES_A_HEADER else 1
        length = headers + -(-data_bytes // _BLOCK)
        if magic != _RECORD_MAGIC or not headers < length <= _MAX_BLOCKS:
            return None
        data = self.block((start + headers) % self.blocks)
        if len(data) < _BLOCK:
            return None
        return _Record(length, oldest & 0xFFFF_FFFF, operations, "<" if byte_order == _LITTLE_ENDIAN else ">", data)

    def holds_superblock_alone(self, last: _Record, head: int) -> bool:
        """Whether all records that the last one says are needed, up to the head, change the superblock alone."""
        at = last.oldest
        for _ in range(_MAX_FREEZE_RECORDS):
            record = self.record(at % self.blocks)
            if record is None or not record.is_superblock_alone:
                return False
            at = (at + record.length) % self.blocks
            if at == head:
                return True
        return False


class _Record(NamedTuple):
    """A record of `length` blocks, and the first block of its data. `oldest`: the first record still needed."""

    length: int
    oldest: int
    operations: int
    byte_order: str
    data: bytes

    @property
    def is_unmount(self) -> bool:
        """Whether it says that the file system was unmounted."""
        return self.operations == 1 and bool(_OPERATION.unpack_from(self.data)[1] & _UNMOUNT)

    @property
    def is_superblock_alone(self) -> bool:
        """Whether it is one transaction, which changes the superblock and nothing else."""
        at = 0
        in_transaction = False
        while at + _OPERATION.size <= len(self.data):
            length, _ = _OPERATION.unpack_from(self.data, at)
            region = self.data[at + _OPERATION.size :][:length]
            at += _OPERATION.size + length
            if length == 0:
                continue  # it starts or commits a transaction
            if in_transaction:
                kind, place = struct.unpack_from(f"{self.byte_order}H6xq", region.ljust(_BUFFER_BYTES, b"\xff"))
                return kind == _BUFFER_TYPE and place == 0 and self.operations == _OPERATIONS_OF_A_BUFFER
            magic, _, _, regions = struct.unpack_from(f"{self.byte_order}4I", region.ljust(_TRANSACTION_BYTES, b"\0"))
            if magic != _TRANSACTION_MAGIC or regions != _REGIONS_OF_A_BUFFER:
                return False
            in_transaction = True
        return False
