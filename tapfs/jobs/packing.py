"""Fill a new image as a stream of compressed granules: threads read and pack, the caller's appends in order.

Where the engine can read by itself, the threads are the engine's, and no granule costs a call of Python.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from tapfs.disk.image import Image
from tapfs.jobs.copying import CopyOptions, data_windows
from tapfs.jobs.early_writeback import EarlyWriteback
from tapfs.jobs.pace import Pace
from tapfs.jobs.pipeline import WINDOW_BYTES, in_order, processors
from tapfs.kernel.window_packer import PackedUnits, PackingRoom, WindowPacker
from tapfs.records import NamedTuple

if TYPE_CHECKING:
    from tapfs.jobs.sources import Source
    from tapfs.kernel.ranges import Ranges

#: Windows that wait to be appended while each thread packs another one.
_WAITING = 2


class _Packed(NamedTuple):
    """The disk up to `until`, its granules with data, and the room that holds them."""

    until: int
    units: PackedUnits
    room: PackingRoom


def copy_packed(
    source: Source, target: Image, progress: Callable[[int, int], None], options: CopyOptions | None = None
) -> None:
    """Pack every granule of `source` that shrinks. What lies past the end of `source` in the last one is zeros."""
    options = options or CopyOptions()
    pace = Pace(options.rate)
    writer = target.stream_writer()
    granule = writer.granule
    window_bytes = -(-WINDOW_BYTES // granule) * granule
    windows = data_windows(source, window_bytes, align=granule)
    workers = min(options.workers or processors(), processors())
    packing = _Packing(source, lambda: PackingRoom(writer.codec, granule, window_bytes))
    with EarlyWriteback(target.engine_disk) as writeback:
        for packed in packing.of(windows, workers):
            writer.write_units(packed.units)
            length = packed.units.length
            packing.rooms.append(packed.room)
            pace.moved(length)
            writeback.wrote(length)
            progress(packed.until, source.size)
    writer.finish()


class _Packing:
    """The windows of a disk, read and packed, in order. `rooms` are those that are not used at the moment."""

    def __init__(self, source: Source, new_room: Callable[[], PackingRoom]) -> None:
        self._source = source
        self._new_room = new_room
        self.rooms: deque[PackingRoom] = deque()

    def of(self, windows: Iterator[Ranges], workers: int) -> Iterator[_Packed]:
        """Each window, packed by so many threads."""
        ahead = workers + _WAITING
        source = self._source
        if not isinstance(source, Image) or source.is_fetched:
            yield from in_order(windows, self._prepare, workers=workers, ahead=ahead)
            return
        with WindowPacker(source.engine_disk, threads=workers - 1, capacity=ahead) as packer:
            self._fill(packer, windows, ahead)
            while packer:
                ranges, room = packer.take()
                if not room.is_packed:  # the engine could not read it by itself
                    self._pack(ranges, room)
                self._fill(packer, windows, ahead)  # so that threads pack while this is written
                yield _Packed(ranges.until, room.units(), room)

    def _fill(self, packer: WindowPacker, windows: Iterator[Ranges], ahead: int) -> None:
        """Have so many windows packed ahead, if there are."""
        while len(packer) < ahead and (ranges := next(windows, None)) is not None:
            packer.add(ranges, self._room())

    def _prepare(self, ranges: Ranges) -> _Packed:
        room = self._room()
        self._pack(ranges, room)
        return _Packed(ranges.until, room.units(), room)

    def _pack(self, ranges: Ranges, room: PackingRoom) -> None:
        self._source.read_ranges(ranges, room.plain)
        room.pack(ranges)

    def _room(self) -> PackingRoom:
        try:
            return self.rooms.pop()
        except IndexError:
            return self._new_room()
