"""Engine disks made by hand: files in a folder, extents without a driver."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tapfs.driver import Cipher, CipherAlgorithm, CipherMode, Codec, Geometry, Identity, Packing, Placement
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Extent, Kind
from tapfs.kernel import writes
from tapfs.kernel._engine import ffi, lib
from tapfs.kernel.engine import EngineDisk, HostDescriptor, Outcome, Status

GRANULE = 4096
UNIT = 4 * GRANULE
KEY = bytes.fromhex("2b7e151628aed2a6abf7158809cf4f3c")
AES = Cipher(CipherAlgorithm.AES, CipherMode.CBC, 16)


def pattern(length: int, seed: int = 1) -> bytes:
    """Bytes that are nowhere zero and differ from place to place and from seed to seed."""
    block = bytes((seed * 37 + i * 7) % 255 + 1 for i in range(255 * 3))
    return (block * (length // len(block) + 1))[:length]


class Disk(EngineDisk):
    """An engine disk that owns the descriptors of its files."""

    def __init__(self, cache_bytes: int = 1 << 20) -> None:
        super().__init__(cache_bytes)
        self.descriptors: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
        for descriptor in self.descriptors:
            os.close(descriptor)

    def layer(
        self,
        *paths: Path,
        size: int,
        granule: int = GRANULE,
        unit: int = UNIT,
        identity: bool = False,
        codec: Codec = Codec.RAW_DEFLATE,
        cipher: Cipher | None = None,
        writable: bool = False,
        direct: bool = False,
    ) -> int:
        """Add a layer with these files."""
        files: list[HostDescriptor] = []
        for path in paths:
            descriptor = open_host(path, direct=direct)
            self.descriptors.append(descriptor)
            files.append(HostDescriptor(descriptor, str(path), direct=direct, writable=writable))
        return self.add_layer(
            Geometry(
                size,
                granule,
                unit,
                identity=Identity() if identity else None,
                packing=Packing(codec) if codec else None,
                cipher=cipher,
            ),
            key=KEY if cipher else None,
            writable=writable,
            files=files,
        )

    def write(self, data: bytes, offset: int) -> Outcome:
        """What a native thread calls: write in place as far as the map allows."""
        outcome = ffi.new("tapfs_outcome *")
        lib.tapfs_write(self.handle, ffi.from_buffer(data), offset, len(data), 0, outcome)
        return self.finished(outcome)

    def write_reserved(self, data: bytes, offset: int, placements: Sequence[Placement], done: int = 0) -> Outcome:
        """Write one run to places that are to cover it."""
        with writes.window_segments(offset, data, [(0, len(data))]) as segments:
            gaps = writes.Gaps(segments, 1)
            gaps.array[0].offset, gaps.array[0].length, gaps.count = offset, len(data), 1
            return writes.write_reserved(self, segments, gaps, writes.Places(placements), done)

    def patch(self, layer: int, extents: Sequence[Extent]) -> None:
        """Change the map of ranges of whole granules where it is cached."""
        array = ffi.new(
            "tapfs_extent[]",
            [(e.offset, e.length, e.host_offset, e.host_length, e.file, e.skip, e.kind, e.in_place) for e in extents],
        )
        if lib.tapfs_disk_patch(self.handle, layer, array, len(extents)) < 0:
            raise ImageError(ErrorKind.IO, "cannot change a map")

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of which no map is missing."""
        buffer = bytearray(b"\xdd") * length
        outcome = self.read_into(buffer, offset)
        assert outcome.status is Status.DONE
        assert outcome.done == length
        return bytes(buffer)

    def put(self, data: bytes, offset: int) -> None:
        """Write bytes of which all is in place."""
        outcome = self.write(data, offset)
        assert outcome.status is Status.DONE
        assert outcome.done == len(data)


def open_host(path: Path, *, direct: bool) -> int:
    """Read and write; where the host file system knows no O_DIRECT the engine's bounce path runs all the same."""
    if direct:
        try:
            return os.open(path, os.O_RDWR | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    return os.open(path, os.O_RDWR)


def host(folder: Path, name: str, content: bytes = b"") -> Path:
    """A host file."""
    path = folder / name
    path.write_bytes(content)
    return path


def extents(*runs: tuple[int, Kind, int]) -> list[Extent]:
    """DATA and other runs as ``(length, kind, host_offset)`` from offset 0 on, in place where DATA."""
    made: list[Extent] = []
    at = 0
    for length, kind, host_offset in runs:
        made.append(Extent(at, length, kind, host_offset=host_offset, in_place=kind == Kind.DATA))
        at += length
    return made


def packed(payloads: Iterable[bytes], start: int, granule: int) -> list[Extent]:
    """COMPRESSED extents for payloads that lie one after the other from `start` on."""
    made: list[Extent] = []
    for index, payload in enumerate(payloads):
        made.append(
            Extent(index * granule, granule, Kind.COMPRESSED, host_offset=start, host_length=len(payload)),
        )
        start += len(payload)
    return made


def place(offset: int, length: int, host_offset: int, *, fresh: bool = False, in_place: bool = False) -> Placement:
    """A placement in file 0."""
    return Placement(offset, length, host_offset, fresh=fresh, in_place=in_place)


def filled(map_of_unit: Sequence[Extent], end: int) -> list[Extent]:
    """The same map with UNALLOCATED from where it ends to `end`."""
    at = map_of_unit[-1].end if map_of_unit else 0
    return [*map_of_unit, *([Extent(at, end - at, Kind.UNALLOCATED)] if at < end else [])]
