"""Fill a new image as a stream of compressed granules: threads read and pack, the caller's appends in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tapfs.jobs.copying import CopyOptions, data_windows
from tapfs.jobs.early_writeback import EarlyWriteback
from tapfs.jobs.pace import Pace
from tapfs.jobs.pipeline import WINDOW_BYTES, BufferPool, in_order, processors
from tapfs.kernel.engine import compress, find_data
from tapfs.records import NamedTuple

if TYPE_CHECKING:
    import mmap

    from tapfs.disk.image import Image
    from tapfs.jobs.sources import Source
    from tapfs.kernel.ranges import Ranges

#: Windows that wait to be appended while each thread packs another one.
_WAITING = 2


class _Granule(NamedTuple):
    """A granule with data: where it is in the disk and in the buffer; its payload, None if it did not shrink."""

    offset: int
    start: int
    payload: bytes | None


class _Packed(NamedTuple):
    """Whole granules that were read and packed."""

    until: int
    buffer: mmap.mmap
    granules: list[_Granule]


def copy_packed(
    source: Source, target: Image, progress: Callable[[int, int], None], options: CopyOptions | None = None
) -> None:
    """Pack every granule of `source` that shrinks. What lies past the end of `source` in the last one is zeros."""
    options = options or CopyOptions()
    pace = Pace(options.rate)
    writer = target.stream_writer()
    granule = writer.granule
    window_bytes = -(-WINDOW_BYTES // granule) * granule
    buffers = BufferPool(window_bytes)

    def prepare(ranges: Ranges) -> _Packed:
        buffer = buffers.take()
        source.read_ranges(ranges, buffer)
        granules: list[_Granule] = []
        begin = 0
        with memoryview(buffer) as view:
            for offset, length in ranges:
                for start, size in find_data(view[begin : begin + length], granule):
                    payloads = compress(writer.codec, view[begin + start : begin + start + size], granule)
                    for number, payload in enumerate(payloads):
                        at = start + number * granule
                        granules.append(_Granule(offset + at, begin + at, payload))
                begin += length
        return _Packed(ranges.until, buffer, granules)

    workers = min(options.workers or processors(), processors())
    windows = data_windows(source, window_bytes, align=granule)
    with EarlyWriteback(target.engine_disk) as writeback:
        for packed in in_order(windows, prepare, workers=workers, ahead=workers + _WAITING):
            with memoryview(packed.buffer) as view:
                for offset, start, payload in packed.granules:
                    if payload is None:
                        writer.write_plain(offset, view[start : start + granule])
                    else:
                        writer.write_compressed(offset, payload)
                    pace.moved(granule if payload is None else len(payload))
                    writeback.wrote(granule if payload is None else len(payload))
            buffers.give_back(packed.buffer)
            progress(packed.until, source.size)
    writer.finish()
