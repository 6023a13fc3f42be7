"""One open virtual disk, as everybody but the drivers and the engine sees it.

Reads find their bytes by tapfs/disk/engine_chain.py; writes reach the disk by tapfs/disk/write_path.py.
"""

from __future__ import annotations

import os
import stat
import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from types import TracebackType
from typing import TYPE_CHECKING, Self

from tapfs.disk.chain import DEFAULT_CACHE_BYTES, Layer
from tapfs.disk.chain_map import MappedExtent
from tapfs.disk.description import ImageInfo, describe, identify_others
from tapfs.disk.disk_map import DiskMap
from tapfs.disk.dropped import close_dropped
from tapfs.disk.engine_chain import EngineChain
from tapfs.disk.stream_target import StreamTarget, stream_into
from tapfs.driver import Begun, OnlyStreamed
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Range

if TYPE_CHECKING:
    from tapfs.disk.disk_file import DiskFile
    from tapfs.disk.plan_log import PlanLog
    from tapfs.disk.write_path import WritePath
    from tapfs.kernel.engine import Buffer, EngineDisk, Outcome, Statistics
    from tapfs.kernel.ranges import Ranges
    from tapfs.kernel.writes import Segments
    from tapfs.partitions.table import DiskContents

#: The bytes of a sector of most disks, and of a partition table that does not say it.
_USUAL_SECTOR = 512

#: Names for front ends and jobs of tapfs only. They may change at any time, and `dir` does not show them.
_INTERNAL = frozenset(
    {
        *("engine_disk", "layers", "supply_map", "try_read", "whole_file", "stream_writer"),
        *("statistics", "description", "is_device", "end_writing", "cache_bytes", "disk_map", "read_ranges"),
        "close_when_dropped",
        *(
            "write_segments",
            "only_streamed",
            "zero_in_place",
            "uncover",
            "engine_chain",
            "packed_appender",
            "is_fetched",
        ),
    }
)


class Image:
    """An open virtual disk. All methods are thread-safe and block; `close` must come last.

    An Image that is dropped without it closes its files and gives a ResourceWarning, as a file object does; it
    does not flush, for it may be a copy in a forked process. The warning says whether metadata was lost so.

    Offsets and lengths are bytes. Any method may raise ImageError. A write is durable when a
    `flush` called after it has returned; after a crash the disk holds all that, and each
    sector written later is old or new.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        *,
        writable: bool,
        password: bytes | None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        plan_log: PlanLog | None = None,
        temporary: bool = False,
        below: Image | None = None,
    ) -> None:
        """Take over an open chain. Use `tapfs.open`. With a plan log writes outlive the process without a flush.

        `temporary`: what is written need not outlive this Image. `below` writes layer 1 (`tapfs.disk.writable_base`).
        """
        self._chain = EngineChain(
            layers,
            writable=writable,
            password=password,
            cache_bytes=cache_bytes,
            below=None if below is None else below.engine_chain,
        )
        #: The bound of the map cache, for who opens the image once more.
        self.cache_bytes = cache_bytes
        self._top = self._chain.top
        self._size = self._chain.size
        self._map = DiskMap(self._chain)
        self._writes = _write_path(self._chain, plan_log) if writable else None
        #: Whether its writes are gone with it, so that its end needs no flush.
        self.temporary = temporary
        kept = None if temporary else self._writes
        self._dropped: weakref.finalize[..., Image] = weakref.finalize(
            self, close_dropped, self._chain, kept, os.getpid()
        )

    def close_when_dropped(self) -> None:
        """Close it without a warning when nobody refers to it any more: its users have no `close` to call."""
        self._dropped.detach()
        self._dropped = weakref.finalize(self, self._chain.close)

    def __repr__(self) -> str:
        mode = "closed" if self.closed else "writable" if self.writable else "read-only"
        return f"<tapfs.Image {self.path!r}: {self.format_name}, {self.size} bytes, {mode}>"

    def __dir__(self) -> list[str]:
        return [name for name in super().__dir__() if name not in _INTERNAL]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # What it is

    @property
    def size(self) -> int:
        """Bytes of the virtual disk."""
        return self._size

    @property
    def path(self) -> str:
        """The image's name as it was opened."""
        return self._top.path

    @property
    def format_name(self) -> str:
        """The image's format."""
        return self._top.driver.format_name

    @property
    def granule(self) -> int:
        """The smallest piece, in bytes, that the image maps on its own."""
        return self._top.driver.geometry.granule

    @property
    def writable(self) -> bool:
        """Whether it was opened for writing."""
        return self._writes is not None

    @property
    def closed(self) -> bool:
        """Whether it was closed or abandoned."""
        return self._chain.closed

    @property
    def is_device(self) -> bool:
        """Whether the disk is a block device of the host, byte for byte."""
        return self._top.file.is_block_device and self._top.driver.geometry.identity is not None

    @property
    def parents(self) -> tuple[str, ...]:
        """The backing files, nearest first."""
        return tuple(layer.path for layer in self._chain.layers[1:])

    @property
    def info(self) -> ImageInfo:
        """What ``tapfs info --json`` prints; of an encrypted image without password only its metadata."""
        self._chain.check_open()
        return self.description(None if self.needs_password else self.contents())

    def description(self, contents: DiskContents | None) -> ImageInfo:
        """What `info` says, with contents of the disk that were looked at before."""
        self._chain.check_open()
        with self._chain.map_lock:
            described = describe(self._chain.layers)
        if contents is not None:
            found = contents.description()
            described["file_system"], described["partitions"] = found["file_system"], found["partitions"]
        return described

    def contents(self, *, sector_size: int | None = None) -> DiskContents:
        """The partition table and the file systems' names.

        Reads a few sectors, and of contents that tapfs does not know 2 MiB for libblkid. `sector_size`: bytes
        in a sector of the disk that the table was made on, where neither the table nor the image says it.
        """
        self._chain.check_open()
        if sector_size is None and self.sector_size != _USUAL_SECTOR:
            sector_size = self.sector_size
        from tapfs.partitions.contents import disk_contents  # only those who ask pay for it

        others = partial(identify_others, fetched=self.is_fetched)
        return disk_contents(self.read, self._size, others, sector_size=sector_size)

    @property
    def sector_size(self) -> int:
        """Bytes of a sector of the guest; an overlay has those of its parent, and 512 is usual.

        A block device that is the disk as it stands has its own, by which a partition table counts.
        """
        for layer in self._chain.layers:
            geometry = layer.driver.geometry
            told = geometry.sector_size
            if told is None and geometry.identity is not None:
                told = layer.file.sector_size
            if told is not None:
                return told
        return _USUAL_SECTOR

    @property
    def needs_password(self) -> bool:
        """Whether an image of the chain is encrypted and no password was given."""
        return self._chain.needs_password

    def statistics(self) -> Statistics:
        """The engine's counters."""
        return self._chain.statistics()

    @property
    def engine_disk(self) -> EngineDisk:
        """What moves the bytes, for a front end with threads of its own in the engine.

        A request that it ends with a MISS goes on after `supply_map`, one that needs a
        reservation with `write`. It is closed by `close`.
        """
        return self._chain.engine

    @property
    def is_fetched(self) -> bool:
        """Whether a file of the chain comes block by block, so that reads of the engine may end with FETCH."""
        return any(file.presence is not None for layer in self._chain.layers for file in layer.files)

    @property
    def engine_chain(self) -> EngineChain:
        """The drivers and the engine's disk together, for an Image that lies over this one."""
        return self._chain

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The chain's images, top first, for who opens their files once more; they stay the Image's."""
        return self._chain.layers

    def open_snapshot(self, name: str, *, password: bytes | None = None, depth: int = 0) -> Image:
        """A snapshot that the image keeps, by its name or id, as a read-only Image of its own on the same open files.

        This Image may be written meanwhile, and closed before or after it. An encrypted one needs its `password` again.
        `depth` is the number of the layer that has the snapshot, 0: the image itself. Raises ImageError.
        """
        from tapfs.disk.live import snapshot_of  # only those who ask pay for it

        self._chain.check_open()
        layers = self._chain.layers[depth:]
        return snapshot_of(layers, name, password=password, cache_bytes=self.cache_bytes)

    @property
    def allocated_bytes(self) -> int:
        """What the files of the chain take on their hosts: an estimate of the data in the disk."""
        self._chain.check_open()
        return sum(layer.files.allocated_size() for layer in self._chain.layers)

    def whole_file(self) -> int | None:
        """The descriptor of the one regular file that is the disk byte for byte, None if there is none.

        Who writes to it goes past the driver: there is none for writing where the image is to say that it is written.
        """
        self._chain.check_open()
        driver = self._top.driver
        geometry = driver.geometry
        identity = geometry.identity
        if identity is None or identity.host_offset or (self.writable and isinstance(driver, Begun)):
            return None
        file = self._top.files[identity.file]
        try:
            status = os.fstat(file.descriptor)
        except OSError:
            return None
        plain = not file.direct and file.presence is None
        same = stat.S_ISREG(status.st_mode) and status.st_size == geometry.virtual_size
        return file.descriptor if same and plain else None

    def extents(self, offset: int = 0, length: int | None = None) -> Iterator[MappedExtent]:
        """The map of the range over the whole chain, merged; holes of raw files are zeros."""
        end = self._size if length is None else offset + length
        self._check_range(offset, end - offset)
        return chain.from_iterable(self._map.blocks(offset, end))

    @property
    def disk_map(self) -> DiskMap:
        """The map in other shapes, for who goes through all of it."""
        self._chain.check_open()
        return self._map

    def read_ranges(self, ranges: Ranges, buffer: Buffer) -> None:
        """Read ranges into a writable buffer, one behind the other. Past the end of the disk there are zeros."""
        self._chain.check_open()
        self._chain.read_ranges(ranges, buffer)

    def open(self, *, partition: int | None = None, sector_size: int | None = None) -> DiskFile:
        """The disk, or the partition with that number, as a binary file object for whatever reads files.

        `sector_size` as for `contents`.
        It may be written if the Image may. Closing it leaves the Image open. Raises ImageError(not_found).
        """
        from tapfs.disk.disk_file import file_of  # only those who ask pay for it

        self._chain.check_open()
        return file_of(self, partition, sector_size=sector_size)

    # Reading

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes at `offset`; the range must lie inside the disk."""
        self._check_range(offset, length)
        buffer = bytearray(length)
        self.read_into(offset, buffer)
        return bytes(buffer)

    def read_into(self, offset: int, buffer: Buffer) -> None:
        """Fill a writable buffer from the disk at `offset`."""
        view = memoryview(buffer)
        self._check_range(offset, len(view))
        self._chain.read_into(view, offset)

    def try_read(self, offset: int, length: int) -> bytes | None:
        """The bytes, or None if they are not to be had without waiting for the host."""
        self._check_range(offset, length)
        buffer = bytearray(length)
        outcome = self._chain.engine.read_into(buffer, offset, nowait=True)
        return bytes(buffer) if outcome.done == length else None

    def supply_map(self, outcome: Outcome) -> None:
        """Ask the drivers for the map that a request of `engine_disk` lacked."""
        self._chain.supply_map(outcome)

    # Writing

    def write(self, offset: int, data: Buffer) -> None:
        """Write all of `data` at `offset`; the disk does not grow."""
        view = memoryview(data).cast("B")
        self._writable_path(offset, len(view)).write(offset, view)

    def write_segments(self, segments: Segments) -> None:
        """Write runs of bytes that lie apart, at the cost of one. After an error any of them may be written."""
        self._writable_path(segments.offset, segments.end - segments.offset).write_segments(segments)

    def write_zeroes(self, offset: int, length: int, *, hide: bool = False) -> None:
        """Make the range read as zeros, without taking space for it where the format can.

        With `hide` the image itself says so, whatever its parents have: it goes on to when it gets others.
        """
        self._writable_path(offset, length).zero(offset, length, hide=hide)

    def discard(self, offset: int, length: int) -> None:
        """The range's contents are not needed any more. Free what the format and host can."""
        self._writable_path(offset, length).discard(offset, length)

    def zero_in_place(self, offset: int, length: int, *, discard: bool) -> None:
        """Have what of the range is in place read as zeros, by holes of the image's files; see the write path."""
        self._writable_path(offset, length).zero_in_place(Range(offset, length), discard=discard)

    def uncover(self, offset: int, length: int) -> None:
        """Have the range show the parent again. The driver `can_uncover` (`tapfs.driver.Uncovering`)."""
        self._writable_path(offset, length).uncover(offset, length)

    def flush(self) -> None:
        """Make every write, zeroing and discard that has returned durable."""
        self._chain.check_open()
        if self._writes is not None:
            self._writes.flush()

    @property
    def only_streamed(self) -> bool:
        """Whether this new image takes its bytes through `stream_writer` alone."""
        driver = self._top.driver
        return isinstance(driver, OnlyStreamed) and driver.only_streamed

    def stream_writer(self) -> StreamTarget:
        """Fill this new, empty image as a stream (compressed, append-only targets).

        Nothing else may be done with the image until the stream has finished.
        """
        self._chain.check_open()
        return stream_into(self._chain)

    def packed_appender(self) -> StreamTarget:
        """Append packed units to this image, each where it holds nothing, ascending; others may read meanwhile.

        Nothing else may be written until the stream has finished. Raises ImageError(unsupported, read_only).
        """
        return self._writable_path(0, 0).packed_appender()

    @property
    def unflushed_bytes(self) -> int:
        """Bytes of metadata that only a flush will bring to the disk."""
        return 0 if self._writes is None else self._writes.unflushed_bytes

    def end_writing(self) -> None:
        """Flush, and have the image say that nobody writes it any more, where its format says such a thing.

        Nobody may be writing. A write that comes later begins anew.
        """
        if self._writes is not None and self._chain.started and not self._chain.closed:
            self._writes.end()

    def close(self) -> None:
        """Flush if writable and not temporary, and let go of the files; closing twice is allowed.

        Raises what the flush met, after everything is closed.
        """
        try:
            if not self.temporary:
                self.end_writing()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Let go of the files without a flush: what was not flushed may be lost."""
        self._dropped.detach()
        self._chain.close()

    def _check_range(self, offset: int, length: int) -> None:
        self._chain.check_open()
        if offset < 0 or length < 0 or offset + length > self._size:
            raise ImageError(
                ErrorKind.OUT_OF_BOUNDS,
                f"[{offset}, {offset + length}) reaches outside the disk of {self._size} bytes",
                path=self.path,
                op="access",
            )

    def _writable_path(self, offset: int, length: int) -> WritePath:
        self._check_range(offset, length)
        if self._writes is None:
            raise ImageError(ErrorKind.READ_ONLY, "was opened read-only", path=self.path, op="write")
        return self._writes


def _write_path(chain: EngineChain, plan_log: PlanLog | None) -> WritePath:
    from tapfs.disk.write_path import WritePath  # it loads the engine, which who only reads metadata needs not

    return WritePath(chain, plan_log)
